"""Where it runs: the cache to outrun, what every run has set, and the few lines that only a GPU needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.latency.nouns import Place
from lora_check.errors import UsageError

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
"""Where Linux describes the caches of the first core."""
UNKNOWN_CACHE = 4 << 20
"""Bytes taken for the private cache of a core where the system does not tell: more than server cores have."""
BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
STALL = 50_000_000
"""Clock cycles for which a stalled GPU does nothing: 25 ms at 2 GHz, far longer than the host needs to queue a call."""


def place_of(device: str) -> Place:
    """The Place of a device name: cpu, cuda or cuda:1.

    raises   UsageError: no such device
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"{device!r} is no device", hint="cpu, cuda or cuda:1") from error
    if kind == "cpu":
        return Place(device=device, cache=private_cache())
    if kind != "cuda":
        raise UsageError(f"the benchmark does not run on {device!r}", hint="cpu, cuda or cuda:1")
    if not torch.cuda.is_available() or (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"torch finds no device {device!r} here", hint="--device cpu runs the same code on small shapes"
        )
    return Place(device=device, cache=torch.cuda.get_device_properties(device).L2_cache_size)


def private_cache(folder: Path = CACHES) -> int:
    """Bytes of the level-2 cache of a core as the system tells them, else UNKNOWN_CACHE."""
    for level in sorted(folder.glob("index*/level")):
        size = level.with_name("size")
        if level.read_text().strip() == "2" and size.exists():
            text = size.read_text().strip()
            return int(text.rstrip("KMG")) * BYTES.get(text[-1:], 1)
    return UNKNOWN_CACHE


@contextmanager
def settled(place: Place) -> Iterator[None]:
    """What every run has: no gradients, full precision of products and of their sums, one thread on a CPU.

    Sums of bfloat16 and float16 products are kept in float32 to their end and TF32 is off: the budget counts on it.
    All of it is put back afterwards.
    """
    products, threads = torch.backends.cuda.matmul, torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    sums = products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction
    device = torch.cuda.device(place.device) if place.kind == "cuda" else nullcontext()
    if place.kind == "cpu":
        torch.set_num_threads(1)
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = False
    torch.set_float32_matmul_precision("highest")
    try:
        with device, torch.inference_mode():
            yield
    finally:
        products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction = sums
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


def synchronise(place: Place) -> None:
    """Wait until the device has done all that was asked of it."""
    if place.kind == "cuda":
        torch.cuda.synchronize(place.device)


def stall(place: Place) -> None:
    """Keep the current stream of a GPU busy for a while: work on another stream overtakes it and is found out."""
    if place.kind == "cuda":
        torch.cuda._sleep(STALL)


def wall(place: Place, work: Callable[[], object]) -> float:
    """Seconds by the clock on the wall from an idle device to an idle device."""
    synchronise(place)
    began = time.perf_counter()
    work()
    synchronise(place)
    return time.perf_counter() - began


def peak(place: Place, work: Callable[[], object]) -> int | None:
    """The most bytes that a GPU held during a piece of work above those that it held before; None on a CPU."""
    if place.kind != "cuda":
        return None
    synchronise(place)
    before = torch.cuda.memory_allocated(place.device)
    torch.cuda.reset_peak_memory_stats(place.device)
    work()
    synchronise(place)
    return torch.cuda.max_memory_allocated(place.device) - before


def captured(calls: Sequence[Callable[[], Tensor]], place: Place) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of calls one after the other -> what replays it, and the output of the last call: a static buffer.

    All of them run once beside the current stream before: what is made at the first call on a stream is made then.
    raises   RuntimeError: something in a call cannot be captured
    """
    beside = torch.cuda.Stream(place.device)
    beside.wait_stream(torch.cuda.current_stream(place.device))
    with torch.cuda.stream(beside):
        for call in calls:
            call()
    torch.cuda.current_stream(place.device).wait_stream(beside)
    synchronise(place)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls[:-1]:
            call()
        output = calls[-1]()
    return graph.replay, output

"""pytest benchmarks/checker/bench_inner_loop.py: the inner loops against their yardsticks, each pair within one run.

Seconds are shown and never asserted. Ratios are, of CPU seconds where both sides have one thread and of wall seconds
where threads are compared; each side is the best of several rounds that take turns.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lora_check
from lora_check import registry
from lora_check.compare import Measure, compare, compare_copy
from lora_check.rounding import ADD, arithmetics
from lora_check.types import Case, LoadedStep, Scale, Verdict

ROWS, COLUMNS = 4096, 4096
PAIRS = 6
"""Tensors of one round: together more than most caches hold, so that none is found there."""
ROUNDS = 5
BY_NAIVE = 6.0
"""The tile loop against the whole-tensor expression, r = 16: measured 10 where this was set."""
BY_ONE = 0.9
"""Two workers against one, on a machine whose other core may be busy."""
BY_MEMCMP = 0.5
"""The comparison of bystanders against memcmp: 4 of the 8 GB/s that two streams have."""
BF16 = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """One target: base (out, in) and merged in bf16, A (r, in) and B (out, r) in fp32."""

    base: Tensor
    a: Tensor
    b: Tensor
    s: float
    merged: Tensor

    @property
    def rank(self) -> int:
        """The inner size."""
        return int(self.a.shape[0])

    def case(self) -> Case:
        """What the tile loop is given."""
        scale = Scale(
            alpha=self.s * self.rank, rank=self.rank, default_alpha=self.s * self.rank, default_rank=self.rank
        )
        step = LoadedStep(
            recipe=registry.load("recipes")["lora-linear"], factors={"A": self.a, "B": self.b}, scale=scale
        )
        return Case(base=self.base, steps=(step,), storage=BF16)


def drawn(rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Merge:
    """Weights of the usual size, merged by whole tensors; `dtype` is what the sum is computed in."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(ROWS, COLUMNS, generator=generator).mul_(0.02).to(torch.bfloat16)
    a = torch.randn(rank, COLUMNS, generator=generator) / COLUMNS**0.5
    b = torch.randn(ROWS, rank, generator=generator) * 0.01
    s = 1.5
    merged = (base.to(dtype) + s * (b.to(dtype) @ a.to(dtype))).to(torch.bfloat16)
    return Merge(base=base, a=a, b=b, s=s, merged=merged)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As every worker runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def merges() -> list[Merge]:
    """Targets of rank 16."""
    return [drawn(16, seed) for seed in range(PAIRS)]


def tiles(merges: list[Merge], first: Any = ADD) -> list[Measure]:
    """The tile loop over several targets."""
    orders = arithmetics(BF16, BF16)
    return [compare(one.case(), one.merged, orders, first) for one in merges]


def naive(merges: list[Merge]) -> list[bool]:
    """The expression over whole tensors that everybody writes."""
    return [
        torch.equal((one.base.float() + one.s * (one.b @ one.a)).to(one.merged.dtype), one.merged) for one in merges
    ]


def bystanders(pairs: list[tuple[Tensor, Tensor]]) -> list[Measure]:
    """The comparison of tensors that no adapter touches."""
    return [compare_copy(Case(base=one, steps=(), storage=BF16), other, (ADD,)) for one, other in pairs]


def memcmp(pairs: list[tuple[Tensor, Tensor]]) -> list[int]:
    """The C library's comparison of the same bytes."""
    function = ctypes.CDLL(None).memcmp
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return [function(one.data_ptr(), other.data_ptr(), one.nbytes) for one, other in pairs]


def ratio(slow: Callable[[], Any], fast: Callable[[], Any], clock: Callable[[], float], rounds: int = ROUNDS) -> float:
    """How many times faster the second is: best of several rounds that take turns."""
    best = [float("inf"), float("inf")]
    for _ in range(rounds):
        for which, deed in enumerate((slow, fast)):
            began = clock()
            deed()
            best[which] = min(best[which], clock() - began)
    return best[0] / best[1]


def shown(benchmark: Any, deed: Callable[[], Any], size: int) -> Any:
    """Let pytest-benchmark time a deed by CPU seconds, and add its rate in GB/s of merged bytes."""
    result = benchmark.pedantic(deed, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["merged_gb_per_cpu_second"] = size / benchmark.stats.stats.min / 1e9
    return result


def save_adapter(named: Mapping[str, Merge], folder: Path) -> None:
    """A PEFT adapter of several targets, all of one rank and scale."""
    stems = {f"base_model.model.{name}": one for name, one in named.items()}
    factors = {f"{stem}.lora_A.weight": one.a for stem, one in stems.items()}
    save_file(
        factors | {f"{stem}.lora_B.weight": one.b for stem, one in stems.items()}, folder / "adapter_model.safetensors"
    )
    one = next(iter(named.values()))
    config = {"peft_type": "LORA", "r": one.rank, "lora_alpha": one.s * one.rank, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


by_cpu = pytest.mark.benchmark(timer=time.process_time)


@by_cpu
@pytest.mark.parametrize("rank", [16, 128])
def test_tile_loop(benchmark: Any, rank: int) -> None:
    targets = [drawn(rank, seed) for seed in range(2)]
    found = shown(benchmark, lambda: tiles(targets), sum(one.merged.nbytes for one in targets))
    assert all(one.fits for one in found)


@by_cpu
def test_tile_loop_where_tiles_differ_by_a_rounding(benchmark: Any) -> None:
    targets = [drawn(16, seed, torch.float64) for seed in range(2)]
    assert not any(naive(targets))
    found = shown(benchmark, lambda: tiles(targets), sum(one.merged.nbytes for one in targets))
    assert all(one.fits for one in found)


@by_cpu
def test_tile_loop_against_whole_tensors(benchmark: Any, merges: list[Merge]) -> None:
    assert all(one.fits and one.exact for one in tiles(merges)), "a fast loop has to be a right one"
    assert all(naive(merges))
    shown(benchmark, lambda: tiles(merges), sum(one.merged.nbytes for one in merges))
    times = ratio(lambda: naive(merges), lambda: tiles(merges), time.process_time)
    benchmark.extra_info["times_naive"] = times
    assert times >= BY_NAIVE


@by_cpu
def test_bystanders_against_memcmp(benchmark: Any, merges: list[Merge]) -> None:
    pairs = [(one.base, one.base.clone()) for one in merges]
    assert all(one.exact for one in bystanders(pairs))
    assert not any(memcmp(pairs))
    shown(benchmark, lambda: bystanders(pairs), sum(one.nbytes for one, _ in pairs))
    times = ratio(lambda: memcmp(pairs), lambda: bystanders(pairs), time.process_time)
    benchmark.extra_info["times_memcmp"] = times
    assert times >= BY_MEMCMP


def test_two_workers_against_one(benchmark: Any, merges: list[Merge], tmp_path: Path) -> None:
    names = [f"model.layers.{place}.mlp.up_proj" for place in range(len(merges))]
    named = dict(zip(names, merges, strict=True))
    base = {f"{name}.weight": one.base for name, one in named.items()}
    merged = {f"{name}.weight": one.merged for name, one in named.items()}
    save_adapter(named, tmp_path)

    def judged(jobs: int) -> None:
        assert lora_check.check(base, tmp_path, merged, jobs=jobs).verdict is Verdict.VERIFIED

    shown(benchmark, lambda: judged(2), sum(one.merged.nbytes for one in merges))
    times = ratio(lambda: judged(1), lambda: judged(2), time.perf_counter)
    benchmark.extra_info["times_one_worker"] = times
    assert times >= BY_ONE

"""The clock of a pass: it reads ahead while the pass runs, and knows afterwards how fast it was and why."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from lora_check.items import Item, sizes_of
from lora_check.reading.ahead import WINDOW, Ahead, read_ahead
from lora_check.reading.plain import is_plain
from lora_check.reading.ranges import Range
from lora_check.reading.throughput import Throughput
from lora_check.reading.touched import touched
from lora_check.types import Checkpoint, Plan

TRIAL_SECONDS = 0.02
"""How long the memory is timed: some hundred MB, and nothing beside a pass that is worth timing."""

WORTH_TIMING = 1 << 28
"""Bytes of a pass from which the memory is timed: 256 MiB take longer to check than the trial does."""

STRIDE, PAGE = 1 << 20, mmap.ALLOCATIONGRANULARITY


@dataclass(slots=True, kw_only=True)
class Meter:
    """A pass that is being timed.

    size         bytes of both models that are done
    cpu_seconds  of workers that are no children of this process
    throughput   of the whole pass, once it has ended
    """

    loads: Mapping[str, tuple[int, int]]
    ahead: Ahead
    size: int = 0
    cpu_seconds: float = 0.0
    throughput: Throughput | None = None

    def done(self, item: Item) -> None:
        """This item is finished."""
        size, read = self.loads[item.key]
        self.size += size
        self.ahead.advance(read)


@contextmanager
def metered(
    plan: Plan,
    asked: Sequence[Item],
    base: Checkpoint,
    merged: Checkpoint,
    *,
    workers: int,
    here: bool = True,
    window: int = WINDOW,
) -> Iterator[Meter]:
    """Read ahead for these items while the body does them in about this order, and time it.

    workers   that do them, of which each can have a core
    here      they run on this machine; else nothing is read ahead
    """
    reads = [touched(plan, item, base, merged) if here else () for item in asked]
    sizes = zip(sizes_of(plan, asked), (sum(block.length for block in blocks) for blocks in reads), strict=True)
    loads = dict(zip((item.key for item in asked), sizes, strict=True))
    blocks = [block for some in reads for block in some]
    with read_ahead(blocks, window=window) as ahead:
        meter = Meter(loads=loads, ahead=ahead)
        began, spent = time.monotonic(), _cpu_seconds()
        yield meter
        seconds, cpu_seconds = time.monotonic() - began, _cpu_seconds() - spent
    cold = ahead.cold
    meter.throughput = Throughput(
        size=meter.size,
        seconds=seconds,
        cpu_seconds=max(0.0, cpu_seconds + meter.cpu_seconds - cold.cpu_seconds),
        workers=workers,
        cold=cold.size,
        cold_seconds=min(cold.seconds, seconds),
        memory_rate=memory_rate(blocks, workers) if meter.size >= WORTH_TIMING else None,
    )


def memory_rate(blocks: Iterable[Range], workers: int) -> float | None:
    """Bytes a second at which these workers read what lies in memory of mapped files, and do nothing with it.

    The last blocks come first: of files larger than memory only they are still there.
    """
    import_module("numpy")  # which the clock must not see
    mapped = [block for block in blocks if block.length >= STRIDE and not is_plain(block.path)][::-1]
    parts = [mapped[place::workers] for place in range(workers)]
    with ThreadPoolExecutor(max_workers=workers) as pool:
        rates = list(pool.map(partial(_rate, deadline=time.perf_counter() + TRIAL_SECONDS), parts))
    return sum(rates) or None


def _rate(blocks: Sequence[Range], deadline: float) -> float:
    began, size = time.thread_time(), 0  # of which a core that others use takes nothing
    with suppress(OSError, ValueError):
        for block in blocks:
            size += _touch(block, deadline)
            if time.perf_counter() >= deadline:
                break
    seconds = time.thread_time() - began
    return size / seconds if seconds > 0 else 0.0


def _touch(block: Range, deadline: float) -> int:
    """Bytes of a block that were read before the deadline."""
    import numpy as np

    start, end, size = block.offset // PAGE * PAGE, block.offset + block.length, 0
    with (
        block.path.open("rb") as file,
        mmap.mmap(file.fileno(), end - start, access=mmap.ACCESS_READ, offset=start) as view,
    ):
        words = np.frombuffer(view, dtype=np.uint64, count=(end - start) // 8)
        for place in range(0, len(words), STRIDE // 8):
            size += 8 * len(words[place : place + STRIDE // 8])
            np.bitwise_or.reduce(words[place : place + STRIDE // 8])
            if time.perf_counter() >= deadline:
                break
        del words  # a mapping that is in use cannot be closed
    return size


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    spent = os.times()
    return time.process_time() + spent.children_user + spent.children_system

"""What the device can do at most, measured in the same run: rates of memory and of products, the cost of a launch.

A ceiling is the best of several samples, of several ways and sizes: whatever a cell reaches, it should not be beaten by
it. So bytes are read from buffers as large as the rotation of a cell (five times the cache: what a cache keeps of such
a round, it keeps here too) and from larger ones, in which the ends of a kernel weigh less; products are those of
random normal matrices, for a product of zeros draws less power and runs faster than any real one.

A launch costs what a clock says of a tiny operation: the same clocks that time the cells, on calls of TINY operations.

Runs inside the settings of a place (no gradients, one intra-op thread on a CPU).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.latency.nouns import Ceilings, Clock, Place, Timed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Once = Callable[[], object]

OUTRUN = 5
"""Working set over cache; a cyclic sweep over five caches finds less than 1 % of it there if lines leave at random."""
LARGER = 8
"""How much larger the second size of a buffer is."""
COLUMNS = 4096
"""Of the matrix that a matrix-vector product reads."""
SIZES = {"cpu": (256, 512, 1024), "cuda": (4096, 8192)}
"""Sides of square products."""
SAMPLES = 5
"""Of each way, at least."""
BURST = {"cpu": 1, "cuda": 4}
"""Operations between two readings of the clock; a GPU has one more queued in front, so that it never waits."""
TINY, CALLS = 64, 16
"""Tiny operations of a call, and calls of a round."""
FLOAT = 4
"""Bytes of an element of the buffers that are read and copied."""


def measured(
    place: Place, dtypes: Iterable[str], clocks: Iterable[Clock] = (), *, working: int = 0, seconds: float = 4.0
) -> Ceilings:
    """Ceilings of a place.

    dtypes    of products, by name         clocks   by which launches are counted; those that are missing there are not
    working   bytes that one round of reading goes over: of a cell's rotation, not more; 0: five times the cache
    seconds   in all, about: every one of read, copy, dtypes and clocks gets the same share, and SAMPLES at least
    """
    dtypes = tuple(dict.fromkeys(dtypes))
    ready = [clock for clock in clocks if not clock.missing(place)]
    working = working or OUTRUN * place.cache
    each = seconds / (2 + len(dtypes) + len(ready))
    return Ceilings(
        read=bytes_a_second(place, reads, working, each),
        copy=bytes_a_second(place, copies, working, each),
        matmul={dtype: flops_a_second(place, dtype, each) for dtype in dtypes},
        launch={clock.name: launch(place, clock, each) for clock in ready},
    )


def bytes_a_second(place: Place, ways: Callable[[Tensor], Iterator[Once]], working: int, seconds: float) -> float:
    """The best rate of any way over buffers of `working` bytes and of LARGER times that."""
    best = 0.0
    for size in (working, LARGER * working):
        buffer = normal((1, COLUMNS), "float32", place).repeat(max(1, size // FLOAT // COLUMNS), 1)
        for way in ways(buffer):
            best = max(best, buffer.numel() * FLOAT / least(place, way, seconds / 4))
    return best


def reads(buffer: Tensor) -> Iterator[Once]:
    """Ways to read every element once and to write next to nothing: a sum, a matrix-vector product."""
    import torch

    vector, out = buffer[0].clone(), buffer.new_empty(buffer.shape[0])
    yield buffer.sum
    yield partial(torch.mv, buffer, vector, out=out)


def copies(buffer: Tensor) -> Iterator[Once]:
    """One half into the other: half of the bytes are read and half written."""
    left, right = buffer.view(-1).chunk(2)
    yield partial(left.copy_, right)


def flops_a_second(place: Place, dtype: str, seconds: float) -> float:
    """The best rate of square products, the first size always, the others while there is time."""
    import torch

    best, end = 0.0, time.monotonic() + seconds
    sizes = SIZES[place.kind]
    for size in sizes:
        if best and time.monotonic() > end:
            break
        left, right = (normal((size, size), dtype, place) for _ in range(2))
        product = partial(torch.mm, left, right, out=torch.empty_like(left))
        best = max(best, 2 * size**3 / least(place, product, seconds / len(sizes)))
    return best


def launch(place: Place, clock: Clock, seconds: float) -> float:
    """Seconds of one tiny operation by a clock: in place, one element, nothing to allocate."""
    import torch

    one = torch.ones(1, device=place.device)

    def call() -> Tensor:
        for _ in range(TINY):
            one.neg_()
        return one

    once = clock.prepare(Timed(name="launch", calls=(call,) * CALLS), place)
    return min(sampled(once, seconds)) / TINY


# --------------------------------------------------------------------------------------------------------- sampling


def least(place: Place, way: Once, seconds: float) -> float:
    """Seconds of one `way`, the least of the samples, after one that is not counted."""
    way()
    return min(sampled(partial(STOPWATCHES[place.kind], way), seconds))


def sampled(once: Callable[[], float], seconds: float) -> list[float]:
    """At least SAMPLES samples, and on until the seconds are spent."""
    found: list[float] = []
    end = time.monotonic() + seconds
    while len(found) < SAMPLES or time.monotonic() < end:
        found.append(once())
    return found


def host(way: Once) -> float:
    """CPU seconds of this thread: with one intra-op thread all work is its own, and other processes do not count."""
    began = time.thread_time()
    for _ in range(BURST["cpu"]):
        way()
    return (time.thread_time() - began) / BURST["cpu"]


def device(way: Once) -> float:
    """Seconds between two events on the device, behind one `way` that keeps it busy while the host queues the rest."""
    import torch

    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    way()
    began.record()
    for _ in range(BURST["cuda"]):
        way()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3 / BURST["cuda"]


STOPWATCHES = {"cpu": host, "cuda": device}


def normal(shape: tuple[int, ...], dtype: str, place: Place) -> Tensor:
    """Random normal numbers on the device."""
    import torch

    form: torch.dtype = getattr(torch, dtype)
    return torch.randn(shape, device=place.device, dtype=form)

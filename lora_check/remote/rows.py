"""Tensors of a remote file: whole, or some rows at a time with a little more read ahead; memory is bounded.

A worker holds rows of one tensor of BASE and of one of MERGED: twice KEPT whatever their size, and a block more of each
where rows are not asked for in order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from math import prod
from mmap import mmap
from threading import Lock

import torch
from torch import Tensor

from lora_check.items import PIECE_BYTES
from lora_check.remote.store import pool

BLOCK = 1 << 21
"""Bytes of one request: on a line of 100 MB/s, 20 ms, about what a round trip costs; several are on their way."""
KEPT = 4 * BLOCK
"""Bytes that a source of rows holds: those that are in use, and three blocks that are on their way."""

Read = Callable[[int, memoryview], None]
"""(byte of the tensor, buffer) -> fills the buffer from there on."""


def whole(read: Read, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor, in blocks that are fetched at once into its own memory."""
    raw = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8)
    parts = _ask(read, 0, raw)
    try:
        for part in parts:
            part.result()
    except BaseException:
        for part in parts:
            part.cancel()
        raise
    return raw.view(dtype).reshape(tuple(shape))


def _ask(read: Read, start: int, raw: Tensor) -> tuple[Future[None], ...]:
    """Have a buffer filled, block by block."""
    view = raw.numpy().data
    return tuple(pool().submit(read, start + at, view[at : at + BLOCK]) for at in range(0, len(view), BLOCK))


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows that are here, or on their way."""

    start: int
    stop: int
    rows: Tensor
    parts: tuple[Future[None], ...]

    def of(self, start: int, stop: int) -> Tensor:
        """Those of the rows that lie in a span, when they have come."""
        for part in self.parts:
            part.result()
        return self.rows[max(start, self.start) - self.start : min(stop, self.stop) - self.start]


class Rows:
    """A matrix of which rows are fetched when they are asked for; who asks on has twice as many read ahead.

    Pieces of work end at multiples of PIECE_BYTES: nothing is read ahead beyond, where another worker begins.
    """

    def __init__(self, read: Read, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape, self.dtype, self._read = shape, dtype, read
        self._width = shape[1] * dtype.itemsize
        self._lock, self._held = Lock(), dict[int, Segment]()
        self._first = self._last = 0

    def __getitem__(self, span: slice) -> Tensor:
        start, stop, step = span.indices(self.shape[0])
        assert step == 1, span
        count = max(0, stop - start)
        if not count or (count > 1 and count * self._width > KEPT):
            return whole(
                lambda at, into: self._read(start * self._width + at, into), (count, self.shape[1]), self.dtype
            )
        with self._lock:
            segments = self._cover(start, stop)
        try:
            found = [one.of(start, stop) for one in segments]
        except BaseException:
            with self._lock:
                self._drop(segments)
            raise
        return found[0] if len(found) == 1 else torch.cat(found)

    def _cover(self, start: int, stop: int) -> list[Segment]:
        """Segments that hold these rows in order, asked for where they are not here, and what is read ahead."""
        goes_on = 0 < self._last == start
        self._first, self._last = self._first if goes_on else start, stop
        wanted = list(self._segments(start, self._ahead(start, stop) if goes_on else stop))
        needed = [one for one in wanted if one.start < stop]
        now = {one.start: one for one in wanted}
        self._held = {start: one for start, one in self._held.items() if start not in now} | now
        self._evict(now.keys())
        return needed

    def _ahead(self, start: int, stop: int) -> int:
        """Where the reading ahead ends, given that the rows since `_first` were asked for in order."""
        piece = max(1, PIECE_BYTES // self._width)
        begin = next((one.start for one in self._held.values() if one.start <= start < one.stop), start)
        fits = begin + min(KEPT // self._width, 2 * (stop - self._first))
        return max(stop, min(fits, -(-stop // piece) * piece, self.shape[0]))

    def _segments(self, start: int, until: int) -> Iterator[Segment]:
        block = max(1, BLOCK // self._width)
        while start < until:
            there = next((one for one in self._held.values() if one.start <= start < one.stop), None)
            if there is None:
                later = min((one.start for one in self._held.values() if one.start > start), default=until)
                there = self._fetched(start, min(start + block, later, until))
            yield there
            start = there.stop

    def _fetched(self, start: int, stop: int) -> Segment:
        # Blocks of the allocator's own heap would stay with the process after they are let go of.
        raw = torch.frombuffer(mmap(-1, (stop - start) * self._width), dtype=torch.uint8)
        parts = _ask(self._read, start * self._width, raw)
        return Segment(start, stop, raw.view(self.dtype).reshape(stop - start, self.shape[1]), parts)

    def _evict(self, wanted: Collection[int]) -> None:
        """Let go of what was used longest ago."""
        size = sum((one.stop - one.start) * self._width for one in self._held.values())
        for start in [one for one in self._held if one not in wanted]:
            if size <= KEPT:
                break
            gone = self._held.pop(start)
            size -= (gone.stop - gone.start) * self._width

    def _drop(self, segments: Sequence[Segment]) -> None:
        for one in segments:
            self._held.pop(one.start, None)

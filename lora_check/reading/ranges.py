"""Where tensors lie: ranges of files, cut into blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

BLOCK = 1 << 24
"""Bytes that are asked of a disk at once: 16 MiB, so that asking costs nothing beside reading."""


class Range(NamedTuple):
    """`length` bytes of a file, from `offset`."""

    path: Path
    offset: int
    length: int


@runtime_checkable
class Placed(Protocol):
    """A checkpoint that knows where in which file a tensor lies."""

    def place(self, name: str) -> Range | None: ...


def in_step(*several: Iterable[Range]) -> Iterator[Range]:
    """The blocks of several tensors by turns: they are read together, row by row."""
    for turn in zip_longest(*(_blocks(one) for one in several)):
        yield from (block for block in turn if block is not None)


def _blocks(some: Iterable[Range]) -> Iterator[Range]:
    for one in some:
        for start in range(0, one.length, BLOCK):
            yield Range(one.path, one.offset + start, min(BLOCK, one.length - start))

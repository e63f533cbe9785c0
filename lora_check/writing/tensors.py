"""The bytes of merged tensors: copied from BASE where nothing changes them, replayed tile by tile where something does.

The formula is that of `replay.written`, the one that a check replays: nothing is computed here in another way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_check.errors import InputError, UsageError
from lora_check.formats._safetensors_files import SUFFIX, Entry, read_header
from lora_check.items import rows_are_enough
from lora_check.replay import TILE_ELEMENTS, bits, written
from lora_check.rounding import ADD, ROUNDED_DELTA, arithmetics
from lora_check.sources import matrix
from lora_check.types import Arithmetic, Case, Checkpoint, Pairing, Step, TensorMeta
from lora_check.work import Job
from lora_check.writing.layout import Shard
from lora_check.writing.workplace import write_all

PIECE = 1 << 26
"""Bytes of a merged tensor that one worker takes at a time."""

CHUNK = 1 << 20
"""Bytes of a copy through memory, where the system cannot copy from file to file."""

FEWEST = 16
"""Rows of a tile: for fewer than eight, BLAS libraries take kernels that sum in another order than for a whole matrix,
and PEFT multiplies whole matrices."""

Done = Callable[[int], None]


UNROUNDED = ("dora-", "lora-bias")
"""Beginnings of LoRA recipes whose delta PEFT adds as it is, safe_merge or not; so do its other tuners."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Where the bytes of a tensor lie in a file."""

    path: Path
    offset: int
    meta: TensorMeta


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some of the bytes of a shard: one tensor, or some rows of it.

    offset   in the shard, of the tensor's first byte
    rows     start and stop; None: all          span   start and stop in bytes, of a tensor that is copied as it lies
    """

    pairing: Pairing
    offset: int
    rows: tuple[int, int] | None = None
    span: tuple[int, int] | None = None


def arithmetic(name: str) -> Arithmetic:
    """The order of operations of that name.

    raises   UsageError: there is none, or its bits depend on the machine
    """
    known = written_arithmetics()
    if name not in known:
        raise UsageError(f"no merge is written in an arithmetic {name!r}", hint=f"one of {', '.join(known)}")
    return known[name]


def written_arithmetics() -> Mapping[str, Arithmetic]:
    """Every order that `replay.written` gives the very bits of: not those of fused or of tensor-core products."""
    every = (ADD, *arithmetics("bfloat16", "bfloat16", others=True))
    return {one.name: one for one in every if not one.fused and one.factors != "tf32"}


def order_of(pairing: Pairing, how: Arithmetic) -> Arithmetic:
    """The order that PEFT takes for one tensor under the switch that gives `how` to all others."""
    plain = any(step.recipe.method or step.recipe.name.startswith(UNROUNDED) for step in pairing.steps)
    return ADD if plain and how == ROUNDED_DELTA else how


def regions(base: Checkpoint) -> dict[str, Region]:
    """Tensor -> its bytes, of what a safetensors file on this machine holds just as BASE is seen."""
    found: dict[str, Region] = {}
    for path in getattr(base, "files", ()):
        if not isinstance(path, Path) or path.suffix != SUFFIX:
            return {}
        entries = read_header(path).entries
        start = path.stat().st_size - (entries[-1].end if entries else 0)
        found |= {one.name: Region(path=path, offset=start + one.begin, meta=one.meta) for one in entries}
    metas = base.metas()
    return {name: region for name, region in found.items() if metas.get(name) == region.meta}


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Writes pieces of shards, from any thread.

    job     loads what a pairing is made of          how   the arithmetic of targets
    stop    set when the run is to end early: a worker leaves after its tile
    """

    job: Job
    how: Arithmetic
    stop: Event = field(default_factory=Event)

    @cached_property
    def lying(self) -> Mapping[str, Region]:
        """What of BASE can be copied from file to file."""
        return regions(self.job.base)

    def pieces(self, shard: Shard, pairings: Mapping[str, Pairing]) -> Iterator[Piece]:
        """A shard cut into what one worker takes at a time, in the order of the file."""
        for entry in shard.entries:
            yield from self._cut(pairings[entry.name], entry, len(shard.head) + entry.begin)

    def _cut(self, pairing: Pairing, entry: Entry, offset: int) -> Iterator[Piece]:
        size = entry.end - entry.begin
        if self._lies(pairing):
            for start in range(0, size, PIECE):
                yield Piece(pairing=pairing, offset=offset, span=(start, min(start + PIECE, size)))
        elif rows_are_enough(pairing) and not any(step.recipe.stacked for step in pairing.steps):
            for span in spans(0, entry.shape[0], PIECE * entry.shape[0] // size):
                yield Piece(pairing=pairing, offset=offset, rows=(span.start, span.stop))
        elif size:
            yield Piece(pairing=pairing, offset=offset)

    def _lies(self, pairing: Pairing) -> Region | None:
        return self.lying.get(pairing.base.name) if pairing.base and _is_untouched(pairing) else None

    def write(self, piece: Piece, descriptor: int, done: Done) -> None:
        """Write one piece to its place in an open file."""
        region = self._lies(piece.pairing)
        if region is not None and piece.span is not None:
            self._copy(region, piece, descriptor, done)
        elif _is_untouched(piece.pairing):
            self._store(piece, matrix_of(self.job, piece.pairing), descriptor, done)
        else:
            self._store(piece, self._merged(piece), descriptor, done)

    def _copy(self, region: Region, piece: Piece, descriptor: int, done: Done) -> None:
        assert piece.span is not None
        start, stop = piece.span
        with region.path.open("rb", buffering=0) as file:
            while start < stop and not self.stop.is_set():
                count = min(stop - start, 16 * CHUNK)
                copy(file.fileno(), region.offset + start, descriptor, piece.offset + start, count)
                start += count
                done(count)

    def _store(self, piece: Piece, source: Source, descriptor: int, done: Done) -> None:
        """Tile by tile to the file."""
        height, columns, rows_at = source
        first, last = piece.rows or (0, height)
        for rows in spans(first, last, TILE_ELEMENTS // max(1, columns)):
            if self.stop.is_set():
                return
            data = as_bytes(rows_at(rows))
            write_all(descriptor, data, piece.offset + rows.start * (len(data) // (rows.stop - rows.start)))
            done(len(data))

    def _merged(self, piece: Piece) -> Source:
        """The rows of a replay, as they are stored."""
        case = case_of(self.job, piece.pairing)
        how = order_of(piece.pairing, self.how)
        replayed = written(case, how)

        def made(rows: slice) -> Tensor:
            """Those rows, if each of their numbers has a place in the dtype of the file."""
            total = replayed.rows(rows).total
            stored = bits(total, case, how)
            demand_finite(stored, piece.pairing.merged)
            return stored

        return Source(case.rows, int(case.base.shape[1]), made)


class Source(NamedTuple):
    """A tensor as a matrix, and its rows as they are to be stored."""

    height: int
    columns: int
    rows: Callable[[slice], Tensor]


def matrix_of(job: Job, pairing: Pairing) -> Source:
    """The rows of a base tensor that nothing changes."""
    assert pairing.base is not None, pairing.merged.name
    found = matrix(job.base, pairing.base.name)
    return Source(int(found.shape[0]), int(found.shape[1]), found.__getitem__)


def case_of(job: Job, pairing: Pairing) -> Case:
    """What a merged tensor is made of; of choices that are equally right, the one that is made here."""
    return job.seen(replace(pairing, steps=tuple(_unsettled(step) for step in pairing.steps)))[0]


def _unsettled(step: Step) -> Step:
    return replace(step, recipe=replace(step.recipe, settled=None)) if step.recipe.settled else step


def spans(first: int, last: int, height: int) -> Iterator[slice]:
    """Row ranges of about that height, each of them `FEWEST` rows high or all that there is."""
    height = max(FEWEST, height)
    while first < last:
        stop = first + height if last - first >= height + FEWEST else last
        yield slice(first, stop)
        first = stop


def demand_finite(stored: Tensor, meta: TensorMeta) -> None:
    """Raise InputError where a number has no place in the dtype that it is stored in.

    A sum over numbers of which one is not finite is not finite either; one that is too large says nothing.
    """
    if not stored.is_floating_point() or isfinite(stored.sum().item()) or bool(stored.isfinite().all()):
        return
    raise InputError(
        f"{meta.name} would hold numbers that are not finite in {meta.dtype}; nothing was written",
        hint="give a --dtype of larger range, and look at BASE and the adapter: `report` tells more",
    )


def as_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in a file."""
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def copy(source: int, begin: int, target: int, offset: int, count: int) -> None:
    """Copy bytes from file to file, within the system where it can."""
    while count:
        try:
            moved = os.copy_file_range(source, target, count, begin, offset)
        except (AttributeError, OSError):
            moved = _through_memory(source, begin, target, offset, count)
        if not moved:
            raise OSError(f"the file of BASE ends {count} bytes too early")
        begin, offset, count = begin + moved, offset + moved, count - moved


def _through_memory(source: int, begin: int, target: int, offset: int, count: int) -> int:
    data = os.pread(source, min(count, CHUNK), begin)
    write_all(target, data, offset)
    return len(data)


def _is_untouched(pairing: Pairing) -> bool:
    """Whether a tensor is that of BASE, byte for byte."""
    base = pairing.base
    return (
        base is not None
        and not pairing.steps
        and (base.dtype, base.shape)
        == (
            pairing.merged.dtype,
            pairing.merged.shape,
        )
    )

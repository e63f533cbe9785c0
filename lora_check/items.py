"""What a check asks for, and the pieces of work that it falls into, which can be sent elsewhere and written down.

A piece of work is a whole tensor, or some rows of one that is large and whose formula sees rows only. The pieces depend
on the plan alone, never on how many workers there are, so the sums of a report do not either.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_check.types import Pairing, Plan, TensorMeta

PIECE_BYTES = 1 << 26
"""Bytes of the merged tensor in one piece of work: large enough that handing it out costs nothing beside reading it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a check was asked to look at: enough for any process to open and plan it alike.

    base, merged   a location each; adapters   in the order of their merging
    """

    base: Any
    adapters: tuple[Any, ...]
    merged: Any
    weights: tuple[float, ...] | None = None
    combination: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    device: str = "cpu"

    def anchored(self) -> Request:
        """The same for a process with another working folder."""
        base, *adapters, merged = map(_anchored, (self.base, *self.adapters, self.merged))
        return replace(self, base=base, adapters=tuple(adapters), merged=merged)


def _anchored(location: Any) -> Any:
    text = os.fspath(location)
    return os.path.abspath(text) if os.path.exists(text) else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One piece of work.

    place    of the pairing in the plan          tensor   its name in MERGED
    rows     which rows of it are compared; None: all
    measure  by which numbers the tensor is refuted, where its mistake is to be named
    known    the mistakes that it is asked about; None: all
    """

    place: int
    tensor: str
    rows: tuple[int, int] | None = None
    measure: Any = None
    known: Mapping[str, Sequence[Mapping[str, Any]]] | None = None

    @property
    def key(self) -> str:
        """'12', or '12:0-4096' for some rows."""
        return str(self.place) if self.rows is None else f"{self.place}:{self.rows[0]}-{self.rows[1]}"

    def __str__(self) -> str:
        """The tensor, or which rows of it."""
        return self.tensor if self.rows is None else f"rows {self.rows[0]} to {self.rows[1] - 1} of {self.tensor}"


def item(plan: Plan, place: int, **asked: Any) -> Item:
    """A piece of work on the pairing at this place."""
    return Item(place=place, tensor=plan.pairings[place].merged.name, **asked)


def items(plan: Plan) -> tuple[Item, ...]:
    """Every comparison that a plan asks for, in the order of the merged files."""
    return tuple(one for place in range(len(plan.pairings)) for one in _items(plan, place))


def _items(plan: Plan, place: int) -> Iterator[Item]:
    spans = pieces(plan.pairings[place])
    if len(spans) < 2:
        yield item(plan, place)
        return
    for span in spans:
        yield item(plan, place, rows=(span.start, span.stop))


def pieces(pairing: Pairing) -> tuple[slice, ...]:
    """The row ranges that a tensor is compared in; one, unless its formula sees rows only."""
    if not rows_are_enough(pairing):
        return (slice(0, _height(pairing)),)
    height = _height(pairing)
    step = max(1, PIECE_BYTES * height // max(1, pairing.merged.nbytes))
    return tuple(slice(start, min(start + step, height)) for start in range(0, height, step))


def rows_are_enough(pairing: Pairing) -> bool:
    """Whether every row can be compared without the others, as both files have it."""
    if pairing.undecidable or pairing.wanted or pairing.base is None or not pairing.merged.numel:
        return False
    same = pairing.base.shape == pairing.merged.shape
    return same and not pairing.base.sealed and not _in_codes(pairing.merged) and _see_rows(pairing)


def loaded_whole(pairing: Pairing) -> bool:
    """Whether a formula asks for the tensors themselves, or one of them is not there or has another shape."""
    same = pairing.base is not None and pairing.base.shape == pairing.merged.shape and not pairing.wanted
    return not same or any(step.recipe.settled for step in pairing.steps)


def whole_because(pairing: Pairing) -> str:
    """Why a tensor has to be whole in memory, as a phrase; "": it has not."""
    metas = [meta for meta in (pairing.base, pairing.merged) if meta is not None]
    if pairing.undecidable:
        return ""
    if any(meta.unmapped for meta in metas):
        return "a file cannot be mapped"
    if any(step.recipe.reads in ("whole", "merged") or step.recipe.settled for step in pairing.steps):
        return "a formula reads the whole weight"
    return "codes have other rows in MERGED" if loaded_whole(pairing) and any(map(_in_codes, metas)) else ""


def numbers_of(pairing: Pairing) -> int:
    """Bytes of the larger of the two tensors, decoded."""
    metas = [meta for meta in (pairing.base, pairing.merged) if meta is not None]
    return max(replace(meta, packed=None).nbytes for meta in metas)


def _see_rows(pairing: Pairing) -> bool:
    """Whether its formulas only add, and, for a bystander, whether it is copied without a conversion."""
    if pairing.kind == "target":
        return all(step.recipe.by_rows for step in pairing.steps)
    return not pairing.steps and pairing.base is not None and pairing.base.dtype == pairing.merged.dtype


def _in_codes(meta: TensorMeta) -> bool:
    return bool(meta.codes or meta.sealed)


def _height(pairing: Pairing) -> int:
    """Rows of the tensor as a matrix."""
    shape = pairing.merged.shape
    if not shape or not pairing.merged.numel:
        return 1 if not shape else 0
    return pairing.merged.numel // shape[-1] if by_lines(pairing) else shape[0]


def by_lines(pairing: Pairing) -> bool:
    """Whether the rows of all its matrices are counted through: the recipe says so, or it is no matter."""
    lone = not pairing.steps and len(pairing.merged.shape) > 2
    return lone or any(step.recipe.stacked for step in pairing.steps)


def size_of(pairing: Pairing) -> int:
    """Bytes of the merged and the base tensor of a pairing."""
    return pairing.merged.nbytes + (pairing.base.nbytes if pairing.base else 0)


def sizes_of(plan: Plan, asked: Sequence[Item]) -> tuple[int, ...]:
    """Bytes that each item has to read of both models."""
    return tuple(_share(plan.pairings[one.place], one) for one in asked)


def _share(pairing: Pairing, asked: Item) -> int:
    if asked.rows is None:
        return size_of(pairing)
    start, stop = asked.rows
    whole, height = size_of(pairing), _height(pairing)
    return whole * stop // height - whole * start // height


def shard(plan: Plan, asked: Sequence[Item], number: int, count: int) -> tuple[Item, ...]:
    """The items of shard `number` of `count`, counted from 1: neighbours in the files, and about as many bytes each."""
    sizes = sizes_of(plan, asked)
    total, done, mine = max(1, sum(sizes)), 0, []
    for one, size in zip(asked, sizes, strict=True):
        middle = done + size // 2
        if middle * count // total == number - 1:
            mine.append(one)
        done += size
    return tuple(mine)

"""Names of MERGED and of BASE -> the matrices that are looked at, one beside the other; headers only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_check import registry
from lora_check.inferring.floors import largest_low_rank
from lora_check.inferring.outcome import Change, Kind
from lora_check.links import lookup
from lora_check.types import FLOATS, Checkpoint, TensorMeta


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A tensor of MERGED and the one of BASE that it comes from.

    stacked   its matrices lie one below the other, one for each expert
    shape     of one matrix; `rows` is how many rows of it both have
    refused   why its numbers cannot be told apart from noise
    """

    merged: TensorMeta
    base: TensorMeta
    shape: tuple[int, int]
    rows: int
    stacked: bool = False
    refused: str = ""

    @property
    def bytes(self) -> int:
        """What there is to read of both."""
        return self.merged.nbytes + self.base.nbytes

    @property
    def places(self) -> Iterator[tuple[str, int]]:
        """The name of each matrix and its first row."""
        if not self.stacked:
            yield self.merged.name, 0
            return
        for expert in range(self.merged.shape[0]):
            yield f"{self.merged.name}[{expert}]", expert * self.rows

    @property
    def is_vector(self) -> bool:
        """Whether it has no rank: one axis or none."""
        return len(self.merged.shape) < 2

    def change(self, tensor: str, kind: Kind = Kind.COPY, **told: Any) -> Change:
        """What is known of one of its matrices before a number is read."""
        shape = self.merged.shape if not self.stacked else self.shape
        return Change(tensor=tensor, kind=kind, shape=tuple(shape), dtype=self.merged.stored_as, **told)


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Every name of both files, once."""

    pairs: tuple[Pair, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


def paired(base: Checkpoint, merged: Checkpoint) -> Paired:
    """Each tensor of MERGED beside its own in BASE: of the same name, or of the one that a layout knows it by."""
    ours, theirs = base.metas(), merged.metas()
    sources = {name: found for name in theirs if (found := lookup(name, ours, base.config)) is not None}
    used, config = set(sources.values()), merged.config or base.config
    return Paired(
        pairs=tuple(_pair(theirs[name], ours[found]) for name, found in sources.items()),
        missing=tuple(name for name in ours if name not in used and not _dropped(ours[name], config)),
        extra=tuple(name for name in theirs if name not in sources),
    )


def _dropped(meta: TensorMeta, config: Mapping[str, Any]) -> bool:
    """Whether the class of MERGED ties or rebuilds it, so that leaving it out changes nothing."""
    return any(layout.drops(meta, config) for layout in registry.load("layouts").values() if layout.drops)


def _pair(merged: TensorMeta, base: TensorMeta) -> Pair:
    stacked = _is_stack(merged.shape)
    sizes = merged.shape[1:] if stacked else merged.shape
    rows, columns = (sizes[0], math.prod(sizes[1:])) if sizes else (1, 1)
    common = rows if stacked or not base.shape else min(rows, base.shape[0])
    return Pair(
        merged=merged,
        base=base,
        shape=(rows, columns),
        rows=common,
        stacked=stacked,
        refused=_refused(merged, base),
    )


def _is_stack(shape: tuple[int, ...]) -> bool:
    """Of three axes: one matrix for each expert, or a short kernel: whichever leaves room for more ranks."""
    if len(shape) != 3:
        return False
    return largest_low_rank(*shape[1:]) > largest_low_rank(shape[0], math.prod(shape[1:]))


def _refused(merged: TensorMeta, base: TensorMeta) -> str:
    if merged.shape[1:] != base.shape[1:] or (merged.shape != base.shape and len(merged.shape) != 2):
        return f"its shape is {merged.shape}, that of BASE {base.shape}"
    if merged.codes:
        return f"it is stored as {merged.codes}, whose rounding hides what was added"
    sealed = next((one for one in (merged, base) if one.sealed), None)
    if sealed is not None:
        return f"it is stored as {sealed.stored_as}, {sealed.sealed}"
    odd = next((one.dtype for one in (merged, base) if one.dtype not in FLOATS), "")
    return f"the rounding of {odd} is not modelled" if odd else ""

"""Deltas of single elements, each at a place of its own; shared by SHiRA and Super-Tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_check.errors import CorruptCheckpointError
from lora_check.types import Factors, Numbers, Site

if TYPE_CHECKING:
    from torch import Tensor


def places(stored: Numbers, limit: int, site: Site) -> Tensor:
    """Indices below `limit`, int64. Windows saves them as floats; what a hypothesis made of those is kept in range.

    raises   CorruptCheckpointError: whole numbers beyond the weight
    """
    from lora_check.functions import middle

    index = middle(stored)
    if index.is_floating_point():
        return index.round().long().clamp(0, limit - 1)
    if not bool(((index >= 0) & (index < limit)).all()):
        raise _corrupt(f"indices of {site.parameter} reach beyond its {limit} places")
    return index.long()


def sorted_by_place(values: Numbers, index: Tensor, site: Site, *, whole: bool) -> Factors:
    """Values (n,) with their places in the flattened weight (n,), in the order of the weight.

    whole    the places were stored as whole numbers, which no hypothesis rounds
    raises   CorruptCheckpointError: a whole-numbered place named twice
    """
    from lora_check.functions import moved

    at, order = index.sort()
    if whole and bool((at.diff() == 0).any()):
        raise _corrupt(f"indices of {site.parameter} name a place twice")
    return {"values": moved(values, lambda x: x[order]), "at": at, "columns": site.shape[1]}


def _corrupt(message: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(message, hint="save the adapter again, and check that it belongs to this base")


def scattered(factors: Factors, rows: slice) -> Numbers:
    """The rows of a matrix of zeros with the values in their places."""
    import torch

    from lora_check.functions import moved

    columns = int(factors["columns"])
    first, last = rows.start * columns, rows.stop * columns
    start, stop = torch.searchsorted(factors["at"], torch.tensor([first, last])).tolist()
    at = factors["at"][start:stop] - first
    # -0.0 leaves every number as it is, a negative zero too; PEFT does not touch the other places at all.
    dense = moved(factors["values"][start:stop], lambda x: x.new_full((last - first,), -0.0).index_copy(0, at, x))
    return moved(dense, lambda x: x.reshape(-1, columns))

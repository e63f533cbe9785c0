"""Tensors of a checkpoint as matrices of which rows can be read when they are asked for.

A mapped file does so by itself. Where a checkpoint has to fetch or to decode, it may offer `rows(name)`; what it offers
is seen here as a matrix, like the tensors of all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from lora_check.types import Checkpoint, RowSource

if TYPE_CHECKING:
    from torch import Tensor


def rows_of(tensor: Tensor, stacked: bool = False) -> Tensor:
    """A tensor as a matrix: its first dimension, and all others in one; of a stack, the rows of all its matrices."""
    if tensor.ndim == 0:
        return tensor.reshape(1, 1)
    if stacked:
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.reshape(tensor.shape[0], -1) if tensor.numel() else tensor.reshape(0, 1)


def offered(checkpoint: Checkpoint, name: str) -> RowSource | None:
    """The tensor by rows, if this checkpoint reads it so."""
    offers = getattr(checkpoint, "rows", None)
    source: RowSource | None = offers(name) if offers else None
    return source


def matrix(checkpoint: Checkpoint, name: str, stacked: bool = False) -> Tensor | RowSource:
    """A tensor as `rows_of` sees it, read by rows where the checkpoint offers that."""
    source = offered(checkpoint, name)
    if source is None or not source.shape or 0 in source.shape:
        return rows_of(checkpoint.read(name), stacked)
    return _Matrix(source, prod(source.shape[1:-1]) if stacked else 1)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """Rows of a source, of which each holds `height` rows of the matrix."""

    source: RowSource
    height: int

    @property
    def shape(self) -> tuple[int, int]:
        rows = int(self.source.shape[0]) * self.height
        return rows, prod(self.source.shape) // rows

    @property
    def dtype(self) -> Any:
        return self.source.dtype

    def __getitem__(self, span: slice) -> Tensor:
        start, stop, _ = span.indices(self.shape[0])
        first = start // self.height
        found = self.source[slice(first, max(first, -(-stop // self.height)))]
        return found.reshape(-1, self.shape[1])[start - first * self.height : stop - first * self.height]

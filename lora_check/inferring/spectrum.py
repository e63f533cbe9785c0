"""The leading singular values of a matrix that is read by rows, by a randomised range finder.

Source: Halko, Martinsson, Tropp, Finding structure with randomness, SIAM Review 53 (2011), algorithms 4.4 and 5.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lora_check.inferring.floors import FIRST_SKETCH, POWERS, SEED


class Rows(Protocol):
    """A matrix by rows."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def spans(self) -> Iterator[slice]: ...
    def tile(self, rows: slice) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """D ~ left diag(values) right.T; left (m, k) and right (n, k) have orthonormal columns.

    values   (k,), falling; each at most the singular value of D of its number       complete   they are all there are
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def complete(self) -> bool:
        """Whether these are all singular values of D."""
        return len(self.values) == min(len(self.left), len(self.right))


def sketch(matrix: Rows, columns: int, start: Tensor | None = None) -> Sketch:
    """The leading singular values and vectors of D, from 2 POWERS + 1 passes over its rows.

    columns   of the sketch: k       start   (n, any): right singular vectors that are known about already
    """
    columns = min(columns, *matrix.shape)
    right = _gaussian(matrix, columns)
    if start is not None:
        right[:, : start.shape[1]] = start[:, :columns]
    for _ in range(POWERS):
        right = _orthonormal(_down(matrix, _orthonormal(_across(matrix, right))))
    left, values, turn = torch.linalg.svd(_across(matrix, right), full_matrices=False)
    return Sketch(left=left, values=values.double(), right=right @ turn.T)


def sketches(matrix: Rows, most: int) -> Iterator[Sketch]:
    """Sketches of twice as many columns each, up to `most` of them; each begins where the one before ended."""
    found: Sketch | None = None
    columns = FIRST_SKETCH
    while found is None or len(found.values) < min(most, *matrix.shape):
        found = sketch(matrix, min(columns, most), None if found is None else found.right)
        yield found
        columns *= 2


def _gaussian(matrix: Rows, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(matrix.shape[1], columns, generator=generator, dtype=matrix.dtype)


def _across(matrix: Rows, right: Tensor) -> Tensor:
    """D R, (m, k)."""
    found = right.new_empty(matrix.shape[0], right.shape[1])
    for rows in matrix.spans():
        torch.matmul(matrix.tile(rows), right, out=found[rows])
    return found


def _down(matrix: Rows, left: Tensor) -> Tensor:
    """D^T L, (n, k)."""
    found = left.new_zeros(matrix.shape[1], left.shape[1])
    for rows in matrix.spans():
        found.addmm_(matrix.tile(rows).T, left[rows])
    return found


def _orthonormal(tall: Tensor) -> Tensor:
    """Q of Q R."""
    basis: Tensor = torch.linalg.qr(tall)[0]
    return basis

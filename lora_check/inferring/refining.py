"""Factors of a change, as close as the noise lets them be: each element counts by how well it is known.

D = U V^T + E, E of known variances v: the likeliest factors have the least sum of (D - U V^T)^2 / v. For one factor at
a time that is a linear system of r unknowns for each row, so they are solved in turn. The singular vectors of the
weighed D, which they start from, are the likeliest where v is a number for each row times one for each column.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_check.inferring.deltas import Delta, Factors, orthogonal
from lora_check.inferring.floors import origins

SWEEPS = 8
"""Times that both factors are solved for. It decides nothing: what is left is measured, and told. On a trained adapter
in bfloat16 the first sweeps halve the elements that round to another number, and the last of eight take off a tenth."""

LARGEST = 32
"""The largest rank that is refined: the systems hold (m + n) r^2 numbers."""


def refined(delta: Delta, factors: Factors) -> Factors:
    """The likeliest factors, by alternating weighted least squares."""
    rank = len(factors.values)
    if rank > LARGEST:
        return factors
    left, right = (factors.left * factors.values).double(), factors.right.double()
    for _ in range(SWEEPS):
        left = torch.cat([_solved(weight, delta, right) for _, delta, weight in _known(delta)])
        right = _columns(delta, left)
    return orthogonal(left, right)


def _known(delta: Delta) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of D, and how well each element is known: 1 / v."""
    origin = origins(*delta.formats)[0]
    for rows in delta.spans():
        merged, base = delta.both(rows, torch.float64)
        difference = merged - base
        yield rows, difference, origin.variance(merged, base, difference).reciprocal_()


def _solved(weight: Tensor, values: Tensor, other: Tensor) -> Tensor:
    """For each row i the u with the least sum over j of weight[i, j] (values[i, j] - u . other[j])^2."""
    return _solve(weight @ _squares(other), (weight * values) @ other)


def _columns(delta: Delta, left: Tensor) -> Tensor:
    """The same for the columns, summed up tile by tile."""
    rank = left.shape[1]
    systems, sides = left.new_zeros(delta.shape[1], rank * rank), left.new_zeros(delta.shape[1], rank)
    for rows, values, weight in _known(delta):
        systems.addmm_(weight.T, _squares(left[rows]))
        sides.addmm_((weight * values).T, left[rows])
    return _solve(systems, sides)


def _squares(tall: Tensor) -> Tensor:
    """x x^T of each row x, (n, r^2)."""
    return (tall[:, :, None] * tall[:, None, :]).flatten(1)


def _solve(systems: Tensor, sides: Tensor) -> Tensor:
    """Symmetric systems of r unknowns, one for each row; a line that nothing is known of gets what is smallest."""
    rank = sides.shape[1]
    inverse: Tensor = torch.linalg.pinv(systems.reshape(-1, rank, rank), hermitian=True)
    return (inverse @ sides[:, :, None])[:, :, 0]

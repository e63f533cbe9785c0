"""Directions that a matrix avoids: what is left of it once its part in them was cut out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_check.faults._low_rank import FEW, LONG, SAMPLE, difference, energy, leading

if TYPE_CHECKING:
    from torch import Tensor

    from lora_check.faults._low_rank import Difference
    from lora_check.types import Case

LONGEST = 8 * LONG
"""Rows or columns up to which all of them are looked at, beside `FEW` of the other kind."""


def along(case: Case, actual: Tensor) -> tuple[Difference, Difference] | None:
    """What the merge changed: all rows with some columns, and all columns with some rows, turned over."""
    rows, columns = (int(size) for size in actual.shape)
    if actual.ndim != 2 or max(rows, columns) > LONGEST:
        return None
    down = difference(case, actual, rows, _few(case, rows))
    across = difference(case, actual, _few(case, columns), columns)
    return (down, across.turned) if down and across else None


def _few(case: Case, other: int) -> int:
    """How many columns are looked at beside so many rows: enough to span what the adapters span."""
    ranks = sum(step.scale.rank for step in case.steps if step.scale)
    return max(FEW, 2 * ranks, min(SAMPLE, LONG * FEW // other))


def is_cut(both: tuple[Difference, Difference] | None) -> bool:
    """Whether what the adapter lacks of merged - base avoids its columns and its rows: it was cut out of this change.

    A singular value decomposition that is cut leaves a rest at right angles to what is kept, on both sides (Eckart and
    Young, 1936). An adapter that was trained has no reason to, and rounding does not know it.
    """
    return both is not None and all(_avoids_own(one) for one in both)


def _avoids_own(one: Difference) -> bool:
    return bool(one.asked.any()) and avoids(one.beside.seen, span(one.asked, one.ranks))


def span(matrix: Tensor, most: int) -> Tensor:
    """Orthonormal columns that span those of a matrix of no higher rank than `most`, noise of its product left out."""
    import torch

    from lora_check.rounding import backward, unit

    basis = leading(matrix, min(most, *matrix.shape))
    turn, values, _ = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    spanned: Tensor = basis @ turn[:, values > backward(max(matrix.shape), unit("float32")) * values[0]]
    return spanned


def avoids(rest: Tensor, basis: Tensor) -> bool:
    """Whether a matrix has less in some directions than `CHANCE` leaves in directions that have nothing to do with it.

    rest   E (m, n), float32        basis   Q (m, r), orthonormal columns

    For a random Q, x = |Q^T E|^2 / |E|^2 is below what it is with probability at most
    exp(t x) prod_i (1 + 2 t w_i / m)^(-r / 2) for each t > 0, w_i = s_i^2 / |E|^2 of the singular values s_i of E:
    Chernoff's bound for the sum of w_i chi^2_r / m, which is what a normal G (m, r) in the place of sqrt(m) Q gives. By
    Jensen's inequality it holds for Q as well: G = Q T with T independent of Q and E T^2 = m I.
    """
    import torch

    from lora_check.rounding import CHANCE

    whole = energy(rest)
    if not whole:
        return False
    small = rest if rest.shape[0] < rest.shape[1] else rest.T
    weights = torch.linalg.eigvalsh((small @ small.T).to(torch.float64)).clamp_min(0) / whole
    share, (rows, ranks) = energy(basis.T @ rest) / whole, basis.shape
    tries = 2.0 ** torch.arange(64, dtype=torch.float64)
    logs = tries * share * rows / 2 - ranks / 2 * torch.log1p(tries[:, None] * weights).sum(1)
    return bool(logs.min().item() < math.log(CHANCE))

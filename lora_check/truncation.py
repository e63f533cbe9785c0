"""Whether a merged tensor can hold a delta that was cut to a rank, though its elements alone do not say.

The best approximation D of rank k of a matrix X is orthogonal to what it leaves of it, (X - D) D^T = 0, and so are any
of their rows. That holds however near singular values lie to each other, where D's elements are hardly known.
"""

from __future__ import annotations

from math import inf, sqrt

import torch
from torch import Tensor

from lora_check.ball import OWN, Ball
from lora_check.number_kinds import stores_delta
from lora_check.replay import Replay, stops
from lora_check.rounding import CUT_FACTORS, CUT_ROUNDINGS, TF32_UNIT, backward, cell, gamma, ulp
from lora_check.types import Arithmetic, Case

ROWS = 512
"""Rows that are asked: the product of two such strips costs far less than the decomposition did."""


def excess(case: Case, actual: Tensor, how: Arithmetic, balls: Replay) -> float:
    """|(X - D) D^T|_F over the most that it can honestly be; above 1, nothing that was cut gave these rows.

    actual   (rows, columns), in the storage dtype      balls   the case over balls of this arithmetic

    A producer cut X' = X + E + C and wrote D' = D + N. E and N are bounded element by element, by what led to X and by
    the stores between D' and the file; |C|_2 by p(n) u |X|, its decomposition's backward error. With F = E - N,

        (X - D) D^T = (X' - D') D'^T - (F + C) D^T - (X' - D') N^T, and the first of these is zero:
        |(X - D) D^T|_F <= |F|_F |D|_2 + |C|_2 |D|_F + (|X - D|_2 + |F|_F + |C|_2) |N|_F

    returns  0 where nothing was cut, or nothing is known of it
    """
    mixed = balls.factors[0].get("mixed") if len(case.steps) == 1 else None
    step = case.steps[0]
    if not isinstance(mixed, Ball) or case.grid is not None or step.flipped or step.window or how.compute == "storage":
        return 0.0
    rows = slice(0, min(ROWS, case.rows))
    x, d = mixed[rows] * step.s, _delta(case, actual, how, balls, rows)
    size, flaw = abs(step.s) * _norm(mixed.bound), backward(max(mixed.shape), mixed.u + 2 * OWN)
    cut, written = flaw * size, _norm(d.rad) + _multiplying(flaw, case, how, mixed.u) * size
    left, seen = x.mid - d.mid, d.mid
    changed = _norm(x.rad) + written
    own = gamma(int(left.shape[1]) + 2, OWN) * _norm(left) * _norm(seen)
    most = changed * _largest(seen) + cut * _norm(seen) + (_largest(left) + changed + cut) * written + own
    return _norm(left @ seen.mT) / most if 0 < most < inf else 0.0


def _delta(case: Case, actual: Tensor, how: Arithmetic, balls: Replay, rows: slice) -> Ball:
    """merged - base, opened up by every store between the product and the file, and by the sum; a store by one ulp."""
    way = stops(case, how)
    low, high = cell(actual[rows], case.storage)
    for stop in reversed(way[:-1]):
        low, high = low - ulp(low, stop), high + ulp(high, stop)
    base = balls.numbers.base(case.base[rows])
    total = Ball((low + high) / 2, (high - low) / 2, base.u)
    found = total.widened(2 * (base.u + OWN)) - base
    stored = stores_delta(how, case.steps[0].recipe.stored) + how.product
    spacing = max(1.0, abs(case.steps[0].s)) * ulp(found.bound, balls.numbers.load)
    return Ball(found.mid, found.rad + stored * spacing, found.u)


def _multiplying(flaw: float, case: Case, how: Arithmetic, u: float) -> float:
    """How far a producer's s U S V^T lies from that of exact factors, in Frobenius norm, relative to |X|.

    U and V are a flaw f away from orthogonal vectors: 2 f + f^2. The absolute values of the terms have a sum of norm
    sum s_i <= sqrt(k) |X|, of which each rounding is a part.
    """
    site = case.steps[0].site
    rank = site.settings["options"].svd_rank if site else case.rows
    each = gamma(rank + CUT_ROUNDINGS, u + OWN) + (CUT_FACTORS * TF32_UNIT if how.factors == "tf32" else 0.0)
    return flaw * (2 + flaw) + sqrt(rank) * each


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x).item())


def _largest(x: Tensor) -> float:
    """|x|_2, from above: the root of the largest eigenvalue of x x^T, whose own error is added."""
    square = x @ x.mT
    off = backward(int(x.shape[0]), OWN) + gamma(int(x.shape[1]), OWN) * int(x.shape[0])
    return sqrt(float(torch.linalg.eigvalsh(square)[-1].clamp_min(0).item())) * (1 + off)

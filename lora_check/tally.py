"""How wrong a refuted tensor is, in one fp32 pass.

One element that no honest order can have written refutes a tensor, and balls have found it. How many there are in all
is evidence: here an element counts only if it lies outside of one bound for its whole tile, which is never smaller than
the ball of the element. So the count is at least right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_check.exclusion import factors_of, largest_product
from lora_check.number_kinds import dtype_of
from lora_check.replay import bits, tiles, written
from lora_check.rounding import between_orders, half_cell
from lora_check.types import Arithmetic, Case


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Sums over all rows, as `compare.Sums` has them.

    over      elements that no honest merge of this arithmetic can have written
    worst     the largest residual, in budgets of its element; at least so many
    unmoved   the base's own bits would pass
    """

    over: int
    signal: float
    cross: float
    noise: float
    worst: float
    unmoved: bool

    @property
    def finite(self) -> bool:
        return all(abs(value) < float("inf") for value in (self.signal, self.cross, self.noise))


def tally(case: Case, actual: Tensor, how: Arithmetic) -> Tally | None:
    """Numbers for a tensor that is refuted; None where the bound is not known for this case, or one is not finite."""
    factors = _two_factors(case, how)
    if factors is None:
        return None
    error, size = between_orders(int(factors[0].shape[0])), abs(case.steps[0].s) * largest_product(*factors)
    producer, over, sums, worst, unmoved = written(case, how), 0, [0.0, 0.0, 0.0], (0.0, 0.0), True
    for span in tiles(case):
        seen = producer.rows(span)
        stored = actual[span].to(seen.total.dtype)
        room = error * (size + _largest(seen.base))
        low, high = (bits(end, case, how).to(stored.dtype) for end in (seen.total - room, seen.total + room))
        over += _outside(stored, low, high)
        unmoved = unmoved and not _outside(case.base[span].to(dtype_of(case.storage)).to(stored.dtype), low, high)
        residual, delta = stored - seen.total, seen.delta.to(stored.dtype)
        pairs = (delta, delta), (residual, delta), (residual, residual)
        sums = [total + torch.dot(*map(_flat, pair)).item() for total, pair in zip(sums, pairs, strict=True)]
        if (largest := _largest(residual)) > worst[0]:
            place = int(residual.abs().argmax())
            worst = largest, largest / (room + _half_cell(_flat(seen.total)[place], case.storage))
    signal, cross, noise = sums
    found = Tally(over=over, signal=signal, cross=cross, noise=noise, worst=worst[1], unmoved=unmoved)
    return found if found.finite else None


def _half_cell(x: Tensor, storage: str) -> float:
    return float(half_cell(x.to(torch.float64).reshape(1), storage))


def _outside(stored: Tensor, low: Tensor, high: Tensor) -> int:
    """How many elements lie below `low` or above `high`, all in fp32 or wider; a zero of either sign is zero."""
    apart = _flat(torch.clamp(stored, low, high).sub_(stored).sign_())
    return int(torch.dot(apart, apart))  # eight times as fast as counting what is not zero, and exact below 2^24


def _largest(x: Tensor) -> float:
    """max |x|."""
    low, high = torch.aminmax(x)
    return max(-float(low), float(high))


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1)


def _two_factors(case: Case, how: Arithmetic) -> tuple[Tensor, Tensor] | None:
    """A and B of a case that is W + s B A and rounds nothing on the way, under this arithmetic."""
    plain = how.factors == "kept" and how.delta != "always" and how.compute == "float32"
    if len(case.steps) != 1 or case.grid is not None or not plain or how.product or how.fused:
        return None
    step = case.steps[0]
    return None if step.recipe.stored or step.window else factors_of(step)

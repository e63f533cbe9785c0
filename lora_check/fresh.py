"""Whether numbers look as an initialiser draws them, and whether two tensors have anything to do with each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_check.rounding import DEVIATIONS, FEWEST, half_cell

SAMPLE = 1 << 20
"""Numbers that are looked at: more would make no test sharper that matters here."""


def sample(x: Tensor) -> Tensor:
    """Some of the rows of a large matrix, evenly spread, float64; all of a small one."""
    return x[:: max(1, -(-x.numel() // SAMPLE))].to(torch.float64)


def drawn(x: Tensor, deviation: float) -> str:
    """How an initialiser may have drawn a matrix, as a phrase; '' if it is unlike all that are known.

    x           (rows, columns), as stored; a draw is normal around zero, or torch's own for a linear layer, uniform
                within 1/sqrt(columns)
    deviation   initializer_range of the model
    """
    numbers = sample(x)
    count = numbers.numel()
    if count < FEWEST:
        return ""
    centre, square = float(numbers.mean()), float(numbers.square().mean())
    bound = 1 / math.sqrt(x.shape[1])
    storage = str(x.dtype).removeprefix("torch.")
    edge = bound + float(half_cell(numbers.new_tensor([bound]), storage))
    if float(numbers.abs().max()) <= edge and _alike(centre, square, bound**2 / 3, 4 / 5, count):
        return f"uniform within 1/sqrt({x.shape[1]})"
    if _alike(centre, square, deviation**2, 2.0, count):
        return f"normal with a deviation of {deviation:g}"
    return ""


def _alike(centre: float, square: float, variance: float, spread: float, count: int) -> bool:
    """Mean and mean square within `DEVIATIONS` of what such a draw has; `spread` is var(x^2) / variance^2."""
    centred = abs(centre) <= DEVIATIONS * math.sqrt(variance / count)
    return centred and abs(square / variance - 1) <= DEVIATIONS * math.sqrt(spread / count)


def related(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have more of a direction in common than independent ones: cos > `DEVIATIONS` / sqrt(n)."""
    one, other = sample(x).reshape(-1), sample(y).reshape(-1)
    lengths = float(one.norm() * other.norm())
    return lengths > 0 and float(torch.dot(one, other)) > DEVIATIONS / math.sqrt(one.numel()) * lengths

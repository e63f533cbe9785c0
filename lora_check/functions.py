"""Functions of recipes over Tensor and Ball alike: on tensors the torch operation, on balls its error bound too.

A recipe that needs more than @ * + - / takes it from here, so that its formula is still written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_check.ball import OWN, Ball
from lora_check.rounding import ELEMENTARY, UNDERFLOW, gamma

Numbers = Any


def moved(x: Numbers, move: Callable[[Tensor], Tensor]) -> Numbers:
    """`move` picks, repeats or rearranges elements and computes nothing: exact."""
    return x.moved(move) if isinstance(x, Ball) else move(x)


def joined(parts: Sequence[Numbers], join: Callable[[Sequence[Tensor]], Tensor]) -> Numbers:
    """`join` puts several tensors together (cat, stack, block_diag) and computes nothing: exact."""
    if isinstance(parts[0], Ball):
        first = parts[0]
        return Ball(join([one.mid for one in parts]), join([one.rad for one in parts]), first.u, first.rounds)
    return join(parts)


def stacked_rows(parts: Sequence[Numbers]) -> Numbers:
    """Matrices below one another."""
    return parts[0] if len(parts) == 1 else joined(parts, lambda blocks: torch.cat(list(blocks)))


def like(x: Numbers, value: Tensor | float) -> Numbers:
    """A constant, exact in float32, in the number kind and dtype of `x`."""
    if isinstance(x, Ball):
        return Ball.exactly(torch.as_tensor(value), x.u, x.rounds)
    return torch.as_tensor(value, dtype=x.dtype)


def identity(x: Numbers) -> Numbers:
    """I of the size of a square matrix, or of each of a batch."""
    batch = middle(x)
    return like(x, torch.eye(int(batch.shape[-1])).expand(batch.shape))


def total(x: Numbers, dim: int) -> Numbers:
    """The sum along one axis: gamma(k, u) sum |x|, in any order (Higham, ASNA, section 4.2)."""
    if not isinstance(x, Ball):
        return x.sum(dim)
    terms = int(x.mid.shape[dim])
    spread = x.rad.sum(dim) + gamma(terms, x.u + OWN) * x.bound.sum(dim) + terms * UNDERFLOW
    return x.made(x.mid.sum(dim), spread)


def mapped(x: Numbers, function: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Numbers:
    """An elementary function of each element, as good as `ELEMENTARY` says.

    slope   (|x| + rad) -> a bound of |f'| over the ball
    """
    if not isinstance(x, Ball):
        return function(x)
    mid = function(x.mid)
    return x.made(mid, slope(x.bound) * x.rad + ELEMENTARY * (x.u + OWN) * mid.abs() + UNDERFLOW)


def solved(a: Numbers, b: Numbers) -> Numbers:
    """X with A X = B, for one matrix or a batch of them.

    Gaussian elimination in precision u solves (A + E) X = B with |E| <= gamma(3 n, u) P^T |L| |U| (Higham, ASNA, theorem
    9.4). With the factors of a float64 elimination that gives, elementwise and with the radii of A and B,
    |error| <= |A^-1| (|E| + rad A) (|X| + |error|) + |A^-1| rad B, which is solved for the error by its norm.
    """
    if not isinstance(a, Ball):
        return _in_float(a, lambda x: torch.linalg.solve(x, b.to(x.dtype)))
    n = int(a.mid.shape[-1])
    pivots, lower, upper = torch.linalg.lu(a.mid)
    grown = pivots @ (lower.abs() @ upper.abs())
    uncertain = a.rad + gamma(3 * n, a.u + OWN) * grown
    inverse, mid = torch.linalg.inv(a.mid).abs(), torch.linalg.solve(a.mid, b.mid)
    first = inverse @ (uncertain @ mid.abs() + b.rad)
    shrink = 1 - (inverse @ uncertain).sum(-1).amax(-1)[..., None, None]
    rest = (inverse @ uncertain).sum(-1, keepdim=True) * first.amax(-2, keepdim=True) / shrink
    error = torch.where(shrink > 0, first + rest, torch.inf)
    return a.made(mid, error + UNDERFLOW)


def _in_float(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function that torch has for float32 and float64 only: a 16-bit tensor is widened for it and stored again."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    return function(wide).to(x.dtype)


def chosen(mask: Tensor, yes: Numbers, no: Numbers) -> Numbers:
    """`yes` where the mask is true, else `no`: exact."""
    return joined([yes, no], lambda pair: torch.where(mask, pair[0], pair[1]))


def middle(x: Numbers) -> Tensor:
    """The numbers themselves, or the middles of balls: to decide by, never to compute with."""
    return x.mid if isinstance(x, Ball) else x

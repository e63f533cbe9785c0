"""Which elements are chosen, over Tensor and Ball alike; where radii leave it open, a ball holds both outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_check.ball import Ball
from lora_check.functions import chosen, like, middle

Numbers = Any


def largest(x: Numbers, density: float) -> Numbers:
    """The int(density n) elements of largest magnitude, the others zero.

    An element is surely in if at most k could be as large, and surely out if k are surely larger.
    """
    count = int(density * middle(x).numel())
    if density >= 1:
        return x
    flat = middle(x).reshape(-1)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.abs().topk(count).indices] = True
    kept = chosen(mask.reshape(x.shape), x, like(x, torch.zeros(x.shape)))
    if not isinstance(x, Ball):
        return kept
    low, high = (x.mid.abs() - x.rad).reshape(-1), (x.mid.abs() + x.rad).reshape(-1)
    rivals = low.numel() - torch.searchsorted(high.sort().values, low, right=False)
    better = low.numel() - torch.searchsorted(low.sort().values, high, right=True)
    open_ = ((rivals > count) & (better < count)).reshape(x.shape)
    return chosen(open_, _hull([x]), kept)


def agreeing_mean(tensors: Sequence[Numbers], weights: Sequence[float], method: str) -> Numbers:
    """The mean over i of w_i T_i where T_i has the elected sign: that of sum T_i ("total") or of sum sign T_i.

    Zero has no sign and agrees with none; a vote of zero elects plus. Any outcome lies between the least and the
    largest of zero and all w_i T_i, which is the ball where a sign is open.
    """
    stack = torch.stack([middle(one) for one in tensors])
    votes = stack if method == "total" else stack.sign()
    elected = torch.where(votes.sum(0) >= 0, 1, -1)
    agree = stack.sign() == elected
    parts = [one * weight for one, weight in zip(tensors, weights, strict=True)]
    total = parts[0] * _ones(agree[0], parts[0])
    for part, mask in zip(parts[1:], agree[1:], strict=True):
        total = total + part * _ones(mask, part)
    mean = total / _ones(agree.sum(0).clamp_min(1), parts[0])
    if not isinstance(mean, Ball):
        return mean
    return chosen(_undecided(tensors, method), _hull(parts), mean)


def _undecided(tensors: Sequence[Ball], method: str) -> Tensor:
    """Where the sign of an element, or of the vote, is not settled by the balls."""
    doubtful = [(one.mid.abs() <= one.rad) & (one.rad > 0) for one in tensors]  # what was pruned is exactly zero
    if method != "total":
        return torch.stack(doubtful).any(0)
    votes = tensors[0]
    for one in tensors[1:]:
        votes = votes + one
    return torch.stack([*doubtful, (votes.mid.abs() <= votes.rad) & (votes.rad > votes.mid.abs())]).any(0)


def _hull(parts: Sequence[Ball]) -> Ball:
    """The ball around zero and all of these."""
    low = torch.stack([one.mid - one.rad for one in parts]).amin(0).clamp_max(0)
    high = torch.stack([one.mid + one.rad for one in parts]).amax(0).clamp_min(0)
    first = parts[0]
    return Ball((low + high) / 2, (high - low) / 2, first.u, first.rounds)


def _ones(mask: Tensor, x: Numbers) -> Numbers:
    """A mask, or counts, as numbers of the kind of x."""
    return Ball.exactly(mask, x.u, x.rounds) if isinstance(x, Ball) else mask.to(x.dtype)

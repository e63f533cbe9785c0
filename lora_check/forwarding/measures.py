"""Numbers over logits: KL divergence, agreement, perplexity, where two continuations part. In float64, row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lora_check.forwarding.kinds import KINDS, Kind
from lora_check.forwarding.nouns import Asked, Pair, Parting, Said

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 16
"""Positions that are held in float64 at a time."""


def pair(names: tuple[str, str], one: Said, other: Said, kind: Kind = KINDS[0]) -> Pair:
    """KL(other || one) and the rest, over every position of every sequence; the vocabulary is that which both have."""
    import torch

    kl, largest, same = [], [], []
    for mine, theirs in zip(one.logits, other.logits, strict=True):
        for first, second in zip(_rows(mine), _rows(theirs), strict=True):
            width = min(first.shape[1], second.shape[1])
            a, b = first[:, :width].double(), second[:, :width].double()
            kl += _kl(a, b).tolist()
            largest.append((a - b).abs().masked_fill(a == b, 0).amax().item())  # also where both are infinite
            same += (a.argmax(-1) == b.argmax(-1)).tolist()
    told = kind.chances and bool(kl)
    exact = all(torch.equal(mine, theirs) for mine, theirs in zip(one.logits, other.logits, strict=True))
    return Pair(
        one=names[0],
        other=names[1],
        positions=len(kl),
        kl_mean=math.fsum(kl) / len(kl) if told else None,
        kl_max=_largest(kl) if told else None,
        logit_max=_largest(largest),
        agreement=sum(same) / len(same) if told else None,
        exact=exact,
    )


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """sum q (log q - log p) of each row, p = softmax(a), q = softmax(b); what has no chance in q adds nothing."""
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    terms = (q.exp() * (q - p)).masked_fill(q == -math.inf, 0)
    return terms.sum(-1).clamp_min(0)  # below 0 by the rounding of float64 alone


def _largest(values: Sequence[float]) -> float:
    """NaN where one of them is, which `max` may pass over."""
    return math.nan if any(math.isnan(one) for one in values) else max(values, default=0.0)


def _rows(logits: Tensor) -> Iterator[Tensor]:
    """A few positions at a time."""
    for start in range(0, len(logits), ROWS):
        yield logits[start : start + ROWS]


def perplexity(said: Said, asked: Sequence[Asked]) -> float | None:
    """exp(- mean ln p(next token)) over the text, the sequences that are only read; None without a text."""
    lost = [
        value
        for logits, one in zip(said.logits, asked, strict=True)
        if not one.goes_on
        for value in _surprises(logits, one.told)
    ]
    if not lost:
        return None
    mean = math.fsum(lost) / len(lost)
    return math.inf if mean > math.log(1e308) else math.exp(mean)  # NaN stays NaN


def _surprises(logits: Tensor, ids: Sequence[int]) -> list[float]:
    """- ln p of each of these tokens, which the rows are about in turn."""
    import torch

    found: list[float] = []
    following = torch.tensor(ids, device=logits.device)
    for rows, wanted in zip(_rows(logits[: len(ids)]), _rows(following), strict=True):
        found += (-rows.double().log_softmax(-1).gather(-1, wanted[:, None])[:, 0]).tolist()
    return found


def partings(one: Said, other: Said, *, rounding: bool) -> tuple[Parting, ...]:
    """Each sequence that two models go on with differently.

    rounding   nothing but rounding lies between the two models, so that what parts them is a near tie
    """
    found = []
    for index, (mine, theirs) in enumerate(zip(one.new, other.new, strict=True)):
        if mine != theirs:
            place = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
            position = min(len(mine), len(theirs)) if place is None else place
            tokens = _token(mine, position), _token(theirs, position)
            found.append(
                Parting(
                    sequence=index,
                    position=position,
                    tokens=tokens,
                    margins=_margins(one.steps[index], other.steps[index], position, tokens),
                    by_rounding=rounding and None not in tokens,
                )
            )
    return tuple(found)


def _token(ids: Sequence[int], position: int) -> int | None:
    """None where that continuation has ended already."""
    return ids[position] if position < len(ids) else None


def _margins(
    one: Tensor | None, other: Tensor | None, position: int, tokens: tuple[int | None, int | None]
) -> tuple[float, float] | None:
    first, second = tokens
    if one is None or other is None or first is None or second is None:
        return None
    mine, theirs = one[position].double(), other[position].double()
    if max(first, second) >= min(len(mine), len(theirs)):
        return None
    found = (mine[first] - mine[second]).item(), (theirs[second] - theirs[first]).item()
    return found if all(math.isfinite(one) for one in found) else None

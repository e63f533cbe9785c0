"""Rows that only one of two tensors has: what an embedding holds beyond the vocabulary that both know."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_check.rounding import mean_reach
from lora_check.types import Case

STRETCH = 1 << 20
"""Elements that are looked at in one go."""


def beyond(actual: Tensor, rows: int, wanted: int) -> str:
    """What there is past the rows that MERGED has and should have, as a phrase: 'rows 96-100 are zero'.

    actual   (its rows, columns), of MERGED
    rows     how many of them were compared          wanted   how many base and adapters give it
    """
    count = int(actual.shape[0])
    if count < wanted:
        return f"{named(count, wanted)} absent"
    return f"{named(rows, count)} {kind_of(actual[rows:], actual[:rows])}"


def named(start: int, stop: int) -> str:
    """'row 96 is', 'rows 96-100 are'."""
    return f"row {start} is" if stop == start + 1 else f"rows {start}-{stop - 1} are"


def kind_of(new: Tensor, old: Tensor) -> str:
    """How rows were made that no adapter trained: zeros, the mean of the rows before them, or neither."""
    if not bool(new.any()):
        return "zero"
    if bool(like_mean(new, old).all()):
        return "the mean of the rows before"
    return "neither zero nor the mean of the rows before"


RIGHT, BASE, ZERO, MEAN, OTHER = "right", "as in BASE", "zero", "the mean of BASE's rows", "neither of these"


def kinds(case: Case, actual: Tensor) -> list[tuple[int, str]]:
    """Each row of a saved tensor that is not BASE's, with what MERGED has there.

    case     its steps replace, and do nothing else
    actual   (rows, columns), of MERGED
    """
    base = case.base if case.resized is None else case.resized
    found = [one for span in _parts(actual) for one in _exactly(case, base, actual, span)]
    others = [row for row, kind in found if kind == OTHER]
    if not others or 2 * len(others) > len(actual):
        return found
    made = {row for row, one in zip(others, like_mean(actual[others], base).tolist(), strict=True) if one}
    return [(row, MEAN if row in made else kind) for row, kind in found]


def _exactly(case: Case, base: Tensor, actual: Tensor, span: slice) -> Iterator[tuple[int, str]]:
    """The rows of a part that should not be BASE's, or are of no kind that can be told bit by bit."""
    seen, old, right = actual[span], base[span].to(actual.dtype), _right(case, span).to(actual.dtype)
    known, moved, kept = len(old), torch.ones(len(seen), dtype=torch.bool), torch.zeros(len(seen), dtype=torch.bool)
    moved[:known], kept[:known] = (right[:known] != old).any(1), (seen[:known] == old).all(1)
    exact, zero = (seen == right).all(1).tolist(), (~seen.any(1)).tolist()
    for row, (is_right, is_base, is_zero) in enumerate(zip(exact, kept.tolist(), zero, strict=True)):
        kind = RIGHT if is_right else BASE if is_base else ZERO if is_zero else OTHER
        if moved[row] or kind == OTHER:
            yield span.start + row, kind


def _parts(matrix: Tensor) -> Iterator[slice]:
    step = max(1, STRETCH // max(1, int(matrix.shape[1])))
    return (slice(start, min(start + step, len(matrix))) for start in range(0, len(matrix), step))


def _right(case: Case, span: slice) -> Tensor:
    rows = case.base[span]
    for step in case.steps:
        assert step.recipe.replace is not None, step.recipe.name
        rows = step.recipe.replace(rows, step.factors, span, step.tokens)
    return rows


def like_mean(new: Tensor, old: Tensor) -> Tensor:
    """Which rows are the mean of all old ones, as transformers makes new ones; bool (new rows,).

    new, old   (rows, columns) in one storage dtype
    """
    count = int(old.shape[0])
    sums = torch.zeros(3, old.shape[1], dtype=torch.float64)
    for span in _parts(old):
        x = old[span].to(torch.float64)
        sums += torch.stack([x.sum(0), x.square().sum(0), x.abs().sum(0)])
    mean, size = sums[0] / count, sums[2] / count
    variance = (sums[1] / count - mean.square()).clamp_min(0)
    reach = mean_reach(new, variance, size, count)
    return ((new.to(torch.float64) - mean).abs() <= reach).all(1)

"""Tensors and rows that an adapter carries whole: what the faults about them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_check.types import Case, LoadedStep

if TYPE_CHECKING:
    from torch import Tensor

STRETCH = 1 << 20
"""Elements that are looked at in one go."""


def stretches(tensor: Tensor) -> Iterator[slice]:
    """The row ranges of a matrix, in file order."""
    step = max(1, STRETCH // max(1, int(tensor.shape[1])))
    return (slice(start, start + step) for start in range(0, int(tensor.shape[0]), step))


def stands_in(base: Tensor) -> bool:
    """Whether these are the zeros, without memory of their own, that stand in for a base that is not there."""
    return base.numel() > 1 and not any(base.stride())


def holds_numbers(tensor: Tensor) -> bool:
    """Whether anything in a matrix is not zero."""
    return not stands_in(tensor) and any(bool(tensor[span].any()) for span in stretches(tensor))


def trained(case: Case) -> tuple[LoadedStep, ...]:
    """The steps that put something of the adapter's in the place of the base when it is merged."""
    return tuple(step for step in case.steps if _puts(step))


def _puts(step: LoadedStep) -> bool:
    return step.recipe.copies and bool(step.factors) and not step.recipe.loads


def with_copies(case: Case, change: Callable[[LoadedStep], LoadedStep]) -> Case:
    """The case with each of these steps changed."""
    return replace(case, steps=tuple(change(one) if _puts(one) else one for one in case.steps))


def spans(numbers: Iterable[int]) -> str:
    """'3, 7-9 and 12' of row numbers in ascending order."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return worded(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def worded(phrases: Iterable[str], limit: int = 4) -> str:
    """'a', 'a and b', 'a, b and c'; of more than `limit` the first ones and a count."""
    every: Sequence[str] = list(phrases)
    shown = every[:limit] if len(every) <= limit else [*every[: limit - 1], f"{len(every) - limit + 1} more"]
    return " and ".join([*([", ".join(shown[:-1])] if shown[1:] else []), *shown[-1:]])

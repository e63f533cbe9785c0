"""Changed cases: what the value faults share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lora_check.types import Case, LoadedStep, Scale


def never(case: Case) -> tuple[Case, ...]:
    """No case: the mistake has no forward model of its own."""
    return ()


def deltas(case: Case) -> tuple[LoadedStep, ...]:
    """The steps that add, in their order."""
    return tuple(step for step in case.steps if not step.recipe.copies)


def copies(case: Case) -> tuple[LoadedStep, ...]:
    """The steps that replace, in their order."""
    return tuple(step for step in case.steps if step.recipe.copies)


def rescaled(case: Case, change: Callable[[Scale], Scale]) -> tuple[Case, ...]:
    """The case with every scale changed; none, if no scale's value moves."""
    steps = tuple(_rescaled(step, change) for step in case.steps)
    if all(new.s == old.s for new, old in zip(steps, case.steps, strict=True)):
        return ()
    return (replace(case, steps=steps),)


def _rescaled(step: LoadedStep, change: Callable[[Scale], Scale]) -> LoadedStep:
    if step.scale is None or step.recipe.copies:
        return step
    return replace(step, scale=change(step.scale))


def tied(case: Case) -> bool:
    """Whether the configuration gives an embedding and its head one adapter."""
    return any(step.site is not None and step.site.settings.get("ensure_weight_tying") for step in deltas(case))

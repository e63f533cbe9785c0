"""Changed cases: what the value faults share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

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


def rescaled(case: Case, change: Callable[[Scale], Scale], **told: Any) -> tuple[Case, ...]:
    """The case with every scale changed; none, if no scale's value moves.

    told   what else there is to say of the change, beside the scale that was used and the right one
    """
    steps = tuple(_rescaled(step, change) for step in case.steps)
    if all(new.s == old.s for new, old in zip(steps, case.steps, strict=True)):
        return ()
    return (replace(case, steps=steps, told={**told, **_instead(case.steps, steps)}),)


def _instead(right: Sequence[LoadedStep], used: Sequence[LoadedStep]) -> dict[str, float]:
    """The scale that was used and the right one, where all adapters have the same."""
    pairs = {(new.s, old.s) for new, old in zip(used, right, strict=True) if old.scale and not old.recipe.copies}
    return dict(zip(("scale", "right"), pairs.pop(), strict=True)) if len(pairs) == 1 else {}


def _rescaled(step: LoadedStep, change: Callable[[Scale], Scale]) -> LoadedStep:
    if step.scale is None or step.recipe.copies:
        return step
    return replace(step, scale=change(step.scale))


def tied(case: Case) -> bool:
    """Whether the configuration gives an embedding and its head one adapter."""
    return any(step.site is not None and step.site.settings.get("ensure_weight_tying") for step in deltas(case))

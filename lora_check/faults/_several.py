"""Several adapters over one tensor: the weight of each, and whose scale it was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_check.faults._cases import deltas
from lora_check.types import Case, LoadedStep


@dataclass(frozen=True, slots=True)
class Members:
    """The adapters whose deltas make a tensor, counted from 0, with the weight and the bare scale of each."""

    adapters: tuple[int, ...]
    weights: tuple[float, ...]
    scales: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.adapters)


def members(case: Case) -> Members:
    """Who they are: the members of one combined adapter, or the adapters that were merged in turn."""
    if (step := combined(case)) is not None:
        given = [i for i in range(len(_settings(step)["weights"])) if _of_member(step, i)]
        weights, scales = ([_settings(step)[key][i] for i in given] for key in ("weights", "scales"))
        return Members(tuple(given), tuple(weights), tuple(scales))
    firsts: dict[int, LoadedStep] = {}
    for step in deltas(case):
        if step.scale is not None:
            firsts.setdefault(step.adapter, step)
    parts = [step.scale for step in firsts.values() if step.scale]
    bare = tuple(replace(one, weight=1.0).value for one in parts)
    return Members(tuple(firsts), tuple(one.weight for one in parts), bare)


def combined(case: Case) -> LoadedStep | None:
    """The step of an adapter that add_weighted_adapter made, if that is what is merged."""
    steps = deltas(case)
    return steps[0] if len(steps) == 1 and "combination" in _settings(steps[0]) else None


def given(case: Case, weights: Sequence[float], sources: Sequence[int], told: Mapping[str, Any]) -> Case:
    """The case in which member i has weights[i] and the scale of member sources[i]."""
    every = members(case)
    place = {adapter: i for i, adapter in enumerate(every.adapters)}
    if (step := combined(case)) is not None:
        return _resettled(case, step, weights, [every.scales[i] for i in sources], told)
    scales = {one.adapter: one.scale for one in deltas(case) if one.scale}
    changed = []
    for one in case.steps:
        if one.scale is None or one.recipe.copies:
            changed.append(one)
            continue
        i = place[one.adapter]
        source = one.scale if sources[i] == i else scales[every.adapters[sources[i]]]
        changed.append(replace(one, scale=replace(source, weight=weights[i])))
    return replace(case, steps=tuple(changed), told=told)


def without(case: Case, adapter: int) -> Case:
    """The case as if that adapter had not been given."""
    if (step := combined(case)) is None:
        return replace(case, steps=tuple(one for one in case.steps if one.adapter != adapter))
    kept = {role: factor for role, factor in step.factors.items() if role not in _of_member(step, adapter)}
    return _exchanged(case, step, replace(step, factors=kept))


def resettled(case: Case, step: LoadedStep, **settings: Any) -> Case:
    """The case in which the adapters of a combining step were combined with other settings."""
    assert step.site is not None
    site = replace(step.site, settings={**step.site.settings, **settings})
    return _exchanged(case, step, replace(step, site=site))


def _resettled(
    case: Case, step: LoadedStep, weights: Sequence[float], scales: Sequence[float], told: Mapping[str, Any]
) -> Case:
    every = members(case).adapters
    lists = {key: list(_settings(step)[key]) for key in ("weights", "scales")}
    for adapter, weight, scale in zip(every, weights, scales, strict=True):
        lists["weights"][adapter], lists["scales"][adapter] = weight, scale
    changed = resettled(case, step, **{key: tuple(values) for key, values in lists.items()})
    return replace(changed, told=told)


def _settings(step: LoadedStep) -> Mapping[str, Any]:
    return step.site.settings if step.site else {}


def _of_member(step: LoadedStep, member: int) -> tuple[str, ...]:
    """The roles of one member's factors in a combining step."""
    return tuple(role for role in step.factors if role in {f"{kind}{member}" for kind in _KINDS})


def _exchanged(case: Case, step: LoadedStep, other: LoadedStep) -> Case:
    return replace(case, steps=tuple(other if one is step else one for one in case.steps))


_KINDS = ("A", "B", "embedding_A", "embedding_B")

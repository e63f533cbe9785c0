"""Targets that hold the base while others are merged: each is given to the one pattern that says most about it.

The patterns are asked from the narrowest to the widest. What one of them takes, the later ones do not see, so that one
mistake is one finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lora_check.extent import extent, place
from lora_check.types import Comparison, Plan, Verdict

NOT_APPLIED, ONE_LEFT_OUT = "LC101", "LC127"
Targets = list[Comparison]


def left_out(plan: Plan, comparisons: Sequence[Comparison]) -> dict[str, Targets]:
    """Code of a pattern -> the targets that it takes; what no pattern takes is not in it."""
    asked = telling(comparisons)
    left = [one for one in asked if one.code == NOT_APPLIED]
    found: dict[str, Targets] = {}
    if len(left) == len(asked) or not any(one.code in (NOT_APPLIED, ONE_LEFT_OUT) for one in asked):
        return found
    for code, takes in _PATTERNS:
        found[code] = takes(plan, left, asked)
        names = {one.tensor for one in found[code]}
        left = [one for one in left if one.tensor not in names]
        asked = [one for one in asked if one.tensor not in names]
    return found


def telling(comparisons: Sequence[Comparison]) -> Targets:
    """The targets that can show whether they were merged: their delta is there, and it would be seen."""
    return [
        one
        for one in comparisons
        if one.kind == "target" and one.verdict is not Verdict.INCONCLUSIVE and one.signal and not one.vanished
    ]


def left_at_base(members: Sequence[Comparison], comparisons: Sequence[Comparison]) -> str:
    """'all 30 k_proj left at the base'."""
    return f"{where(members, comparisons)} left at the base"


def where(members: Iterable[Comparison], comparisons: Sequence[Comparison]) -> str:
    """What these are among all targets."""
    return extent([one.tensor for one in members], [one.tensor for one in comparisons if one.kind == "target"])


def targets(comparisons: Sequence[Comparison]) -> int:
    """How many targets there are."""
    return sum(one.kind == "target" for one in comparisons)


# --------------------------------------------------------------------------------- patterns, the narrowest first


def _parameters(plan: Plan, left: Targets, asked: Targets) -> Targets:
    """Raw parameters that target_parameters names, where another one of the same module is merged."""
    said = [one.config.raw.get("target_parameters") for one in plan.adapters]
    named = [str(name) for one in said if isinstance(one, (list, tuple)) for name in one]

    def parameter(one: Comparison) -> str:
        return next((name for name in named if one.module == name or one.module.endswith(f".{name}")), "")

    merged = _merged(left, asked)
    done = {parameter(one) for one in merged}
    homes = {one.module.rpartition(".")[0] for one in merged if parameter(one)}
    return [
        one for one in left if parameter(one) and parameter(one) not in done and one.module.rpartition(".")[0] in homes
    ]


def _adapters(_: Plan, left: Targets, asked: Targets) -> Targets:
    """The targets that only such adapters of several have as nothing shows to be merged anywhere."""
    used = {index for one in _merged(left, asked) for index in one.adapters if index + 1 not in missing(one)}
    idle = {index for one in asked for index in one.adapters} - used
    return [one for one in left if idle.issuperset(one.adapters)] if used else []


def missing(one: Comparison) -> frozenset[int]:
    """The adapters, counted from 1, that a shared target was found to lack."""
    return frozenset(one.told.get("missing", ())) if one.code == ONE_LEFT_OUT else frozenset()


def _shards(plan: Plan, left: Targets, asked: Targets) -> Targets:
    """All that is left out, where it is just what some of the files of MERGED hold, more than one target each."""
    homes: dict[str, list[Comparison]] = {}
    for one in asked:
        homes.setdefault(plan.homes.get(one.tensor, ""), []).append(one)
    lost = {plan.homes.get(one.tensor, "") for one in left}
    whole = all(len(homes[file]) > 1 and _all_left(homes[file]) for file in lost)
    return left if whole and "" not in lost and lost < homes.keys() else []


def _components(_: Plan, left: Targets, asked: Targets) -> Targets:
    """The targets of whole parts of a model that hold stacks of layers, where other stacks are merged."""
    merged = _merged(left, asked)
    if not any(place(one.tensor).stack for one in merged):
        return []
    parts = set(components(left, merged))
    return [one for one in left if any(one.tensor.startswith(f"{part}.") for part in parts)]


def components(left: Iterable[Comparison], merged: Iterable[Comparison]) -> list[str]:
    """The shortest paths that hold stacks of layers and nothing that is merged: 'vision_tower'."""
    taken = {path for one in merged for path in _paths(one.tensor)}
    found = {}
    for one in left:
        stack = place(one.tensor).stack
        free = [path for path in _paths(one.tensor) if path not in taken and f"{stack}.".startswith(f"{path}.")]
        if stack and free:
            found[free[0]] = True
    return list(found)


def _paths(tensor: str) -> list[str]:
    """a, a.b, a.b.c of a.b.c.weight."""
    names = tensor.split(".")[:-1]
    return [".".join(names[:end]) for end in range(1, len(names) + 1)]


def _experts(_: Plan, left: Targets, asked: Targets) -> Targets:
    """All experts, or those of which every target is left out, in layers where something is merged."""
    experts = [one for one in asked if is_expert(one)]
    if _all_left(experts):
        return experts
    alive = {_layer(one) for one in _merged(left, asked)}
    whole = {_expert(one) for one in experts} - {_expert(one) for one in _merged(left, experts)}
    return [one for one in left if is_expert(one) and _expert(one) in whole and _layer(one) in alive]


def is_expert(one: Comparison) -> bool:
    """Whether a tensor belongs to the experts of a mixture, one by one or stacked; shared ones are none of these."""
    return any(name.endswith("experts") and "shared" not in name for name in one.tensor.split("."))


def _families(_: Plan, left: Targets, asked: Targets) -> Targets:
    """The families of which no target is merged."""
    merged = {one.family for one in _merged(left, asked)}
    return [one for one in left if one.family not in merged]


def _tail(_: Plan, left: Targets, asked: Targets) -> Targets:
    """The last layers of a stack, two or more, where only these are left out of it and the first is not."""
    lost, every = _layers(left, asked), {layer for one in asked if (layer := _layer(one))}
    found: set[tuple[str, int]] = set()
    for stack in {stack for stack, _ in lost}:
        numbers = sorted(number for name, number in every if name == stack)
        gone = sorted(number for name, number in lost if name == stack)
        if 1 < len(gone) < len(numbers) and gone == numbers[-len(gone) :]:
            found |= {(stack, number) for number in gone}
    return [one for one in left if _layer(one) in found]


def _whole_layers(_: Plan, left: Targets, asked: Targets) -> Targets:
    """The layers of which no target is merged, where another layer is."""
    lost = _layers(left, asked)
    return [one for one in left if _layer(one) in lost]


def _layers(left: Targets, asked: Targets) -> set[tuple[str, int]]:
    """The layers of which no target is merged; none, if there is no other layer."""
    alive = {layer for one in _merged(left, asked) if (layer := _layer(one))}
    return {layer for one in left if (layer := _layer(one)) and layer not in alive} if alive else set()


def _layer(one: Comparison) -> tuple[str, int] | None:
    found = place(one.tensor)
    return None if found.layer is None else (found.stack, found.layer)


def _expert(one: Comparison) -> tuple[str, int | None, int | None]:
    found = place(one.tensor)
    return found.stack, found.layer, found.expert


def _merged(left: Targets, asked: Targets) -> Targets:
    names = {one.tensor for one in left}
    return [one for one in asked if one.tensor not in names]


def _all_left(some: Targets) -> bool:
    return bool(some) and all(one.code == NOT_APPLIED for one in some)


_PATTERNS: tuple[tuple[str, Callable[[Plan, Targets, Targets], Targets]], ...] = (
    ("LC508", _parameters),
    ("LC507", _adapters),
    ("LC504", _shards),
    ("LC505", _components),
    ("LC503", _experts),
    ("LC501", _families),
    ("LC506", _tail),
    ("LC502", _whole_layers),
)

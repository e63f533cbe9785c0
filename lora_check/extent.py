"""Where a finding lies, as a person would say it: 'all 30 k_proj', 'experts 32-63 of layer 3 (96 of 210 targets)'.

A tensor's name gives its place: a stack of layers, the layer's number, an expert's number, a family. What a finding is
about is told by these where it is exactly what they single out, else it is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from lora_check.types import Comparison, Kind

_NUMBER = re.compile(r"[0-9]{1,9}")
_EXPERTS = "experts"
NAMES, RUNS, PIECES = 4, 6, 3
"""How many names, runs of numbers and pieces are listed; what takes more is counted."""

USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies.

    stack   the path before the layer's number; empty outside any layer     layer, expert   its number, if it has one
    family  the last name; the one before it too, where it is 'bias'        path            all that follows the numbers
    """

    tensor: str
    stack: str
    layer: int | None
    expert: int | None
    family: str
    path: str


@lru_cache(maxsize=1 << 17)
def place(tensor: str) -> Place:
    """('model.layers', 12, 3, 'up_proj') of model.layers.12.mlp.experts.3.up_proj.weight."""
    names = tensor.removesuffix(".weight").split(".")
    numbers = [at for at, name in enumerate(names[:-1]) if at and _NUMBER.fullmatch(name)]
    experts = [at for at in numbers if names[at - 1].endswith(_EXPERTS)]
    layers = [at for at in numbers if at not in experts]
    layer, expert = (at[0] if at else None for at in (layers, experts))
    rest = names[max(layer or -1, expert or -1) + 1 :] if layer or expert else names
    return Place(
        tensor=tensor,
        stack=".".join(names[:layer]) if layer else "",
        layer=int(names[layer]) if layer else None,
        expert=int(names[expert]) if expert else None,
        family=_family(rest),
        path=".".join(rest),
    )


def _family(names: Sequence[str]) -> str:
    """The last name; the one before it too, where the last is a number or says 'bias'."""
    last = names[-1]
    return ".".join(names[-2:]) if last == "bias" or _NUMBER.fullmatch(last) else last


NOUNS: Mapping[Kind, str] = {"target": "target", "copy": "saved tensor", "bystander": "bystander"}


def extent(
    members: Collection[str], everything: Collection[str], noun: str = "target", marks: Mapping[str, str] | None = None
) -> str:
    """What `members` are among `everything`, in words.

    members, everything   names of tensors, the first among the second
    marks                 tensor -> something else that may single members out: 'rank 16'
    """
    wanted, total = set(members), len(set(everything))
    if len(wanted) == total:
        return f"all {total} {noun}s" if total > 1 else f"the only {noun}"
    places = [place(name) for name in dict.fromkeys(everything)]
    inside = [one for one in places if one.tensor in wanted]
    count = f"{len(inside)} of {total} {noun}s"
    families = {one.family for one in inside}
    if len(families) == 1 and len(inside) > 1 and len(inside) == sum(one.family in families for one in places):
        return f"all {len(inside)} {inside[0].family}"
    if where := _whole(inside, places) or _pieces(inside, places):
        return f"{where} ({count})"
    if mark := marked(wanted, marks or {}):
        return f"all {len(inside)} {noun}s of {mark}"
    counts = Counter(one.family for one in inside)
    told = ", ".join(f"{family} {number}" for family, number in counts.most_common())
    return f"{count} ({told})" if len(counts) <= NAMES else count


def by_kind(
    members: Sequence[Comparison], everything: Sequence[Comparison], marks: Mapping[str, str] | None = None
) -> str:
    """'all 12 targets and gate_proj of layers 0-2 (3 of 18 bystanders)': the extent among the tensors of each kind."""
    told = []
    for kind, noun in NOUNS.items():
        ours, others = ([one.tensor for one in some if one.kind == kind] for some in (members, everything))
        told += [extent(ours, others, noun, marks)] if ours else []
    return " and ".join(told)


def marked(wanted: Collection[str], marks: Mapping[str, str]) -> str:
    """The marks that these tensors have and no others, if there are other marks."""
    ours = {marks.get(name, "") for name in wanted}
    same = {name for name, mark in marks.items() if mark in ours}
    return listed(sorted(ours)) if "" not in ours and same == set(wanted) and len(ours) <= 2 else ""


def _whole(inside: Sequence[Place], places: Sequence[Place]) -> str:
    """'all layers of visual.blocks', 'all experts', 'all k_proj and v_proj', where it is just that."""
    stacks = {one.stack for one in inside}
    whole = len(inside) == sum(one.stack in stacks for one in places)
    if whole and "" not in stacks and len(stacks) <= NAMES:
        several = len({one.stack for one in places} - {""}) > 1
        return f"all layers of {listed(sorted(stacks))}" if several else "all layers"
    if all(one.expert is not None for one in inside) and len(inside) == sum(one.expert is not None for one in places):
        return "all experts"
    families = list(dict.fromkeys(one.family for one in inside))
    named = _names(families, [one.family for one in places])
    if not named or len(inside) != sum(one.family in families for one in places):
        return ""
    return named if len(inside) == len(families) else _all(named)


def _pieces(inside: Sequence[Place], places: Sequence[Place]) -> str:
    """The same by stack, layer and expert: at most a few pieces, each a product of families, layers and experts."""
    several = len({one.stack for one in places} - {""}) > 1
    for named in (_by_family, _by_path):
        told = {
            stack: _of_stack(
                [one for one in inside if one.stack == stack], [one for one in places if one.stack == stack], named
            )
            for stack in dict.fromkeys(one.stack for one in inside)
        }
        pieces = [f"{one} of {stack}" if several and stack else one for stack, every in told.items() for one in every]
        if all(told.values()) and len(pieces) <= PIECES:
            return listed(sorted(pieces, key=lambda one: " of " in one))
    return ""


Named = Callable[[Place], str]


def _by_family(one: Place) -> str:
    return one.family


def _by_path(one: Place) -> str:
    """Where one family name means several modules of a layer: encoder_attn.q_proj."""
    return one.path


def _of_stack(inside: Sequence[Place], places: Sequence[Place], named: Named) -> list[str]:
    """The pieces of one stack: one, or one for each way families or layers can be grouped; none if they are many."""
    ways = (
        [list(inside)],
        _grouped(inside, named, lambda one: (one.layer, one.expert)),
        _grouped(inside, lambda one: one.layer, lambda one: (named(one), one.expert)),
    )
    told = [[_product(group, places, named) for group in groups] for groups in ways if len(groups) <= PIECES]
    sayable = [pieces for pieces in told if all(pieces)]
    return min(sayable, key=lambda pieces: (len(pieces), sum(map(len, pieces))), default=[])


def _grouped(
    inside: Sequence[Place], by: Callable[[Place], object], alike: Callable[[Place], object]
) -> list[list[Place]]:
    """Places with one value of `by` stay together, and with those whose `alike` take the same values."""
    first: dict[object, list[Place]] = {}
    for one in inside:
        first.setdefault(by(one), []).append(one)
    groups: dict[frozenset[object], list[Place]] = {}
    for members in first.values():
        groups.setdefault(frozenset(map(alike, members)), []).extend(members)
    return list(groups.values())


def _product(inside: Sequence[Place], places: Sequence[Place], named: Named) -> str:
    """The words for all places of these families, layers and experts; nothing if `inside` lacks one of them."""
    families, layers = {named(one) for one in inside}, {one.layer for one in inside}
    experts = {one.expert for one in inside}
    same = [one for one in places if named(one) in families and one.layer in layers and one.expert in experts]
    if len(same) != len(inside):
        return ""
    if None not in experts:
        return _of_experts(inside, [one for one in places if one.expert is not None], named)
    if len(experts) > 1 and experts != {one.expert for one in places if one.layer in layers}:
        return ""
    return _of_layers(inside, places, named)


def _of_layers(inside: Sequence[Place], places: Sequence[Place], named: Named) -> str:
    """'k_proj of layers 12-23', 'layers 12-23', 'lm_head'."""
    families = list(dict.fromkeys(map(named, inside)))
    everyone = list(dict.fromkeys(map(named, places)))
    names = "" if len(families) == len(everyone) and inside[0].layer is not None else _names(families, everyone)
    every = {one.layer for one in places if named(one) in families}
    if inside[0].layer is None:
        return names
    if not names and len(families) != len(everyone):
        return ""
    layers = {one.layer for one in inside}
    if layers == every:
        return (_all(names) if len(every) > 1 else names) or "all layers"
    numbers = _numbers("layer", layers)
    return f"{names} of {numbers}" if names and numbers else numbers


def _of_experts(inside: Sequence[Place], places: Sequence[Place], named: Named) -> str:
    """'experts 32-63 of layer 3', 'gate_proj of experts 0-3 in all layers'."""
    families = list(dict.fromkeys(map(named, inside)))
    everyone = list(dict.fromkeys(map(named, places)))
    names = "" if len(families) == len(everyone) else _names(families, everyone)
    if not names and len(families) != len(everyone):
        return ""
    numbers, layers = {one.expert for one in inside}, {one.layer for one in inside}
    whole = numbers == {one.expert for one in places}
    experts = "all experts" if whole else _numbers("expert", numbers)
    every = layers == {one.layer for one in places} and len(layers) > 1
    where = "in all layers" if every else f"{'in' if names else 'of'} {_numbers('layer', layers)}"
    if not experts or where.endswith(" "):
        return ""
    head = f"{names} of {experts}" if names else experts
    return head if layers == {None} or (every and whole) else f"{head} {where}"


def _all(names: str) -> str:
    return f"all {names}" if names and not names.startswith("all ") else names


def _names(families: Sequence[str], everyone: Iterable[str]) -> str:
    """'q_proj and v_proj', or 'all families but k_proj'; nothing where that would be long."""
    others = list(dict.fromkeys(one for one in everyone if one not in families))
    if 0 < len(others) <= 2 and len(families) > max(2, len(others)):
        return f"all families but {listed(sorted(others, key=_usual))}"
    return listed(sorted(families, key=_usual)) if len(families) <= NAMES else ""


def _usual(name: str) -> int:
    """Where a family stands in the order in which a layer uses them; files sort them by letters."""
    last = name.rsplit(".", 1)[-1]
    return USUAL.index(last) if last in USUAL else len(USUAL)


def _numbers(noun: str, numbers: Iterable[int | None]) -> str:
    """'layer 3', 'layers 0, 5 and 7-9', 'every 2nd layer from 1 to 31'; nothing where that would be long."""
    every = sorted(number for number in numbers if number is not None)
    told = runs(every)
    if len(every) == 1:
        return f"{noun} {every[0]}"
    if len(told) <= RUNS // 2 or (len(told) <= RUNS and not _step(every)):
        return f"{noun}s {listed(told, RUNS)}"
    step = _step(every)
    ordinal = {2: "2nd", 3: "3rd"}.get(step, f"{step}th")
    return f"every {ordinal} {noun} from {every[0]} to {every[-1]}" if step else ""


def _step(numbers: Sequence[int]) -> int:
    """The difference between neighbours, if it is one and the same."""
    steps = {after - before for before, after in pairwise(numbers)}
    return steps.pop() if len(steps) == 1 else 0


def layers_of(tensors: Iterable[str]) -> dict[str, str]:
    """Stack -> its layers among these: '0-3, 7, 12-23'."""
    layers: dict[str, set[int]] = {}
    for one in map(place, tensors):
        if one.layer is not None:
            layers.setdefault(one.stack, set()).add(one.layer)
    return {stack: ", ".join(runs(sorted(numbers))) for stack, numbers in sorted(layers.items())}


def runs(numbers: Sequence[int]) -> list[str]:
    """0 1 2 5 -> 0-2, 5."""
    starts = [n for at, n in enumerate(numbers) if at == 0 or numbers[at - 1] != n - 1]
    ends = [n for at, n in enumerate(numbers) if at == len(numbers) - 1 or numbers[at + 1] != n + 1]
    return [f"{a}-{b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True)]


def listed(names: Sequence[str], limit: int = NAMES) -> str:
    """'a', 'a and b', 'a, b and c'; of more than `limit` the first ones and a count."""
    every = list(names)
    shown = every if len(every) <= limit else [*every[: limit - 1], f"{len(every) - limit + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"

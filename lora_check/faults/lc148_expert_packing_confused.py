"""LC148 expert-packing-confused

What it is
The factors of a stack of experts were cut along their rank as if packed in another order.

How it happens
lora_A and lora_B of target_parameters hold all experts in one matrix each. PEFT reads A expert by expert, and B with
the expert the fastest index; the files do not say so, and kernels and exporters read either one the other way. An
exporter that takes the number of experts from one shard cuts both at the wrong places. Seen in exports by Unsloth.

How it is told
W'[e] = W[e] + s B'_e A'_e reproduces every element, with A' or B' or both cut the other way. What cannot be seen is how
the adapter was trained: if its trainer packed as this merge cut, the merge is what was trained, and PEFT is wrong about
the adapter. Only outputs of the trainer's own model can tell.

Evidence
cut: which factor was cut how.

What to do
Compare the outputs of base plus adapter in the trainer with both merges; then merge with the trainer's packing.

Seen in
unslothai/unsloth#6930, unslothai/unsloth#5410, unslothai/unsloth-zoo#647
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_check.faults._places import Place, beside, place
from lora_check.faults._rows import is_pair, refactored, said
from lora_check.types import Case, LoadedStep, ValueFault

if TYPE_CHECKING:
    from torch import Tensor


def inject(case: Case) -> tuple[Case, ...]:
    """W'[e] = W[e] + s B'_e A'_e, with A' or B' or both cut the other way, or for fewer experts."""
    if any(step.recipe.stacked for step in case.steps):
        return (*_stacks(case), *_counts(case))
    return tuple(_cut_apart(case))


CUTS = (("A",), ("B",), ("A", "B"))
ORDERS = {"A": "A taken rank by rank", "B": "B taken expert by expert"}


def _cut(roles: Sequence[str]) -> str:
    return " and ".join(ORDERS[role] for role in roles)


# ---------------------------------------------------------------------------------------------- one stack, one tensor


def _stacks(case: Case) -> Iterator[Case]:
    for roles in CUTS:
        yield from refactored(case, partial(_repacked, roles=roles), cut=_cut(roles))


def _experts(step: LoadedStep) -> int:
    return step.site.shape[0] if step.site and step.recipe.stacked and step.factors.keys() == {"A", "B"} else 0


def _repacked(step: LoadedStep, roles: Sequence[str]) -> Mapping[str, Tensor]:
    """Row e r + j of A from row j E + e, column j E + e of B from column e r + j."""
    a, b, count = step.factors.get("A"), step.factors.get("B"), _experts(step)
    if not count or a is None or b is None:
        return {}
    moved = {
        "A": a.reshape(-1, count, a.shape[1]).transpose(0, 1).reshape(a.shape),
        "B": b.reshape(b.shape[0], count, -1).transpose(1, 2).reshape(b.shape),
    }
    return {role: moved[role] for role in roles}


def _counts(case: Case) -> Iterator[Case]:
    """As many experts as a half, a quarter or an eighth of them: each with as much more rank, the rest with nothing."""
    counts = {_experts(step) for step in case.steps}
    count = counts.pop() if len(counts) == 1 else 0
    for parts in (2, 4, 8):
        if count > parts and count % parts == 0:
            steps = tuple(replace(step, factors=_fewer(step, count, parts)) for step in case.steps)
            yield replace(case, steps=steps, told={"cut": f"for {count // parts} experts in place of {count}"})


def _fewer(step: LoadedStep, count: int, parts: int) -> Mapping[str, Tensor]:
    """The factors as E / n experts cut them, in the packing of E experts of rank n r, all but the first E / n zero."""
    a, b, fewer = step.factors["A"], step.factors["B"], count // parts
    wide_a = a.new_zeros(count, a.shape[0] // fewer, a.shape[1])
    wide_b = b.new_zeros(b.shape[0], b.shape[1] // fewer, count)
    wide_a[:fewer] = a.reshape(fewer, -1, a.shape[1])
    wide_b[:, :, :fewer] = b.reshape(b.shape[0], -1, fewer)
    return {"A": wide_a.reshape(-1, a.shape[1]), "B": wide_b.reshape(b.shape[0], -1)}


# ------------------------------------------------------------------------------------------ one tensor an expert


def _cut_apart(case: Case) -> Iterator[Case]:
    """The same of a file that keeps each expert in a tensor of its own: ranks that the other experts hold."""
    own = place(case.name).expert
    if own is None or len(case.steps) != 1 or not _is_cut(case.steps[0]):
        return
    peers = dict(beside(case, _expert))
    if sorted({own, *peers}) != list(range(len(peers) + 1)):
        return
    loaded = {own: case.steps[0].factors}

    def factors(expert: int) -> Mapping[str, Tensor]:
        if expert not in loaded:
            loaded[expert] = peers[expert].steps()[0].factors
        return loaded[expert]

    count, rank = len(peers) + 1, _rank(loaded[own])
    a_from, b_from = [i * count + own for i in range(rank)], [own * rank + i for i in range(rank)]
    needed = {at // rank for at in a_from} | {at % count for at in b_from}
    if any(_rank(factors(expert)) != rank for expert in needed):
        return
    a = _stacked([factors(at // rank)["A"][at % rank] for at in a_from], 0)
    b = _stacked([factors(at % count)["B"][:, at // count] for at in b_from], 1)
    for roles in CUTS:
        changed = {role: factor for role, factor in (("A", a), ("B", b)) if role in roles}
        yield from refactored(case, partial(_given, changed=changed), cut=_cut(roles))


def _rank(factors: Mapping[str, Tensor]) -> int:
    return int(factors["A"].shape[0]) if factors.keys() == {"A", "B"} else 0


def _expert(there: Place) -> int | None:
    return there.expert


def _is_cut(step: LoadedStep) -> bool:
    """Whether the factors are those of one expert of a raw parameter, cut out of a pair for all of them."""
    if step.site is None or not is_pair(step):
        return False
    named = step.site.settings.get("target_parameters") or ()
    return any(step.site.parameter.endswith(str(one)) for one in named)


def _given(step: LoadedStep, changed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return changed


def _stacked(parts: Sequence[Tensor], axis: int) -> Tensor:
    import torch

    return torch.stack(list(parts), axis)


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Which factor was cut how."""
    return f"factors of the experts cut in another packing ({said(told, 'cut')})"


FAULT = ValueFault(
    code="LC148",
    name="expert-packing-confused",
    severity="error",
    summary="factors of the experts cut in another packing",
    help="compare both packings with the outputs of base plus adapter in the trainer, and merge with that one",
    inject=inject,
    tell=tell,
    causes=("M18", "M40"),
)

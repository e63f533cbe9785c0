"""LC127 adapter-left-out

What it is
Several adapters were given, and one or more of them are not in the merge.

How it happens
A later stage, such as DPO, was merged into the base without the stage that it was trained on.
Only the active adapter was merged: merge_and_unload() without adapter_names.
A loop over the adapters starts again from the base each time, and saves the last.

How it is told
W' = W + s_i B_i A_i reproduces every element with one adapter left out, or with one alone. In modules that
only one adapter has, its delta is missing altogether, and they are told as not applied (LC101).

Evidence
missing: the adapters that are not in, counted from 1. merged: those that are.

What to do
Merge the earlier stage first, and each later one into its result, or all of them in one call with
adapter_names.

Seen in
hiyouga/LlamaFactory#2588, hiyouga/LlamaFactory#3821, huggingface/trl#250, modelscope/ms-swift#8047,
huggingface/peft#643
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import reduce

from lora_check.faults._findings import listed
from lora_check.faults._said import Told, each
from lora_check.faults._several import members, without
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """One adapter left out, or all but one; those of a weight that leaves nothing of them are left out anyway."""
    adapters = [one for one, weight in zip(*_weighted(case), strict=True) if weight]
    if len(adapters) < 2:
        return ()
    alone = {(one,) for one in adapters}
    fewer = {tuple(one for one in adapters if one != left) for left in adapters}
    return tuple(_only(case, kept, adapters) for kept in sorted(alone | fewer))


def _weighted(case: Case) -> tuple[tuple[int, ...], tuple[float, ...]]:
    every = members(case)
    return every.adapters, tuple(w * s for w, s in zip(every.weights, every.scales, strict=True))


def _only(case: Case, kept: Collection[int], adapters: Collection[int]) -> Case:
    left = [one for one in adapters if one not in kept]
    told = {"missing": [one + 1 for one in left], "merged": [one + 1 for one in sorted(kept)]}
    return replace(reduce(without, left, case), told=told)


def tell(told: Told) -> str:
    """'adapter 2 left out'."""
    left = each(tuple(one.get("missing", ())) for one in told)
    if len(left) > 1 or not left[0]:
        return FAULT.summary
    return f"adapter{'s' if len(left[0]) > 1 else ''} {listed(map(str, left[0]))} left out"


FAULT = ValueFault(
    code="LC127",
    name="adapter-left-out",
    severity="error",
    summary="adapters left out",
    help="merge the earlier stage first and each later one into its result, or all in one call with adapter_names",
    inject=inject,
    tell=tell,
    causes=("M13", "M30", "M41"),
)

"""LC123 weight-ignored

What it is
An adapter was merged with another weight than --weights gives it: with 1, or with an equal share of 1.

How it happens
The command that merged was not given the weights, or its tool knows none: merge_and_unload() has no weight.
A script averages all adapters, whatever their weights.
The weights went to the loader of another adapter, and one adapter kept its 1.

How it is told
W' = W + sum of c_i s_i B_i A_i reproduces every element with all c_i = 1, with all c_i = 1 / n, or with one
of them 1 and the others right.

Evidence
weights: those that were used, in the order of the adapters. adapter: the one whose weight was ignored, if it is
one of several.

What to do
Pass the weights to the command that merges, or take the --weights that it was run with.

Seen in
kohya-ss/sd-scripts#868, huggingface/diffusers#3743, siliconflow/onediff#924
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_check.faults._said import Told, each, number
from lora_check.faults._several import Members, given, members
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """All weights 1, all 1 / n, or one of several 1: each that is not what was asked for."""
    every = members(case)
    if not every.count or set(every.weights) == {1.0}:
        return ()
    own = range(every.count)
    told = {weights: {"weights": list(weights), **which} for weights, which in reversed(list(_used(every)))}
    return tuple(
        given(case, weights, own, said) for weights, said in reversed(told.items()) if weights != every.weights
    )


def _used(every: Members) -> Iterator[tuple[tuple[float, ...], dict[str, int]]]:
    count = every.count
    yield (1.0,) * count, {}
    yield (1.0 / count,) * count, {}
    for i, adapter in enumerate(every.adapters if count > 1 else ()):
        yield (*every.weights[:i], 1.0, *every.weights[i + 1 :]), {"adapter": adapter + 1}


def tell(told: Told) -> str:
    """'weight of adapter 2 ignored', 'weights ignored: merged with 1 and 1'."""
    adapters = each(one.get("adapter") for one in told)
    if len(adapters) == 1 and adapters[0]:
        return f"weight of adapter {adapters[0]} ignored"
    used = each(", ".join(map(number, one["weights"])) for one in told if "weights" in one)
    return f"weights ignored, {used[0]} used" if len(used) == 1 else "weights ignored"


FAULT = ValueFault(
    code="LC123",
    name="weight-ignored",
    severity="error",
    summary="weights ignored",
    help="pass the weights to the command that merges, or check with the --weights that it was run with",
    inject=inject,
    tell=tell,
    causes=("M10", "M30"),
)

"""LC147 delta-of-another-expert

What it is
Experts of a mixture hold the deltas of other experts of their layer.

How it happens
Experts were counted from the start of a shard (expert parallelism gives each rank its own 0), taken from names sorted
as text (1, 10, 11, 2), in reverse, or one off where a shared expert is counted. Seen as a number of experts taken from
one shard of the adapter; the other orders are what such code can write.

How it is told
W' = W + P reproduces every element, with P the delta of the same projection of another expert; in a stack, with the
factors of all its experts in another order.

Evidence
own, of: the expert, and that whose delta it holds. orders: the rules that lead there; of a stack, the rule of it all.

What to do
Number the experts through all shards, as the router does, before their factors are stacked or named, and merge again.

Seen in
unslothai/unsloth-zoo#647, modelscope/ms-swift#6447
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_check.faults._findings import listed
from lora_check.faults._places import Place, beside, likely_sources, order_told, orders, place, with_factors_of
from lora_check.faults._rows import refactored
from lora_check.types import Case, LoadedStep, ValueFault

if TYPE_CHECKING:
    from torch import Tensor

MOST = 32
"""Experts that are tried for one tensor."""


def _expert(there: Place) -> int | None:
    return there.expert


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + P, P of another expert; of a stack, the factors of all its experts in another order."""
    if any(step.recipe.stacked for step in case.steps):
        return tuple(_stacks(case))
    own = place(case.name).expert
    if own is None:
        return ()
    others = dict(beside(case, _expert))
    numbers = sorted({own, *others})
    chosen = likely_sources(own, numbers, MOST)
    told = ((others[of], {"own": own, "of": of, "orders": orders(own, of, numbers, "expert")}) for of in chosen)
    return with_factors_of(case, told)


def _stacks(case: Case) -> Iterator[Case]:
    """The whole stack, by each rule that leads somewhere from its first two experts and from its last."""
    counts = {step.site.shape[0] for step in case.steps if step.site and step.recipe.stacked}
    if len(counts) != 1:
        return
    numbers = list(range(counts.pop()))
    for rule, order in _rules(numbers).items():
        if order != numbers:
            yield from refactored(case, partial(_reordered, order=order), orders=[rule])


def _rules(numbers: Sequence[int]) -> dict[str, list[int]]:
    """Rule -> the expert whose delta each of them gets."""
    count = len(numbers)
    found = {
        "each expert holds the delta of the expert before it": [numbers[i - 1] for i in numbers],
        "each expert holds the delta of the expert after it": [numbers[(i + 1) % count] for i in numbers],
        "deltas of the experts in reverse order": list(reversed(numbers)),
        "deltas of the experts in the order of their names as text": sorted(numbers, key=str),
        "deltas of the experts put where the order of their names as text has them": _inverse(sorted(numbers, key=str)),
    }
    for parts in (2, 4, 8):
        if count % parts == 0 and count > parts:
            size = count // parts
            found[f"deltas of the experts counted anew in each of {parts} parts"] = [i % size for i in numbers]
            turned = [(i + size) % count for i in numbers]
            found[f"deltas of the experts {size} further on"] = turned
            found[f"deltas of the experts dealt out to {parts} parts in turn"] = [
                (i % size) * parts + i // size for i in numbers
            ]
    return found


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]


def _reordered(step: LoadedStep, order: Sequence[int]) -> Mapping[str, Tensor]:
    """A (experts r, x), expert-major, and B (y, r experts), expert-fastest, with the experts in that order."""
    if not step.recipe.stacked or step.factors.keys() != {"A", "B"}:
        return {}
    a, b, count = step.factors["A"], step.factors["B"], len(order)
    return {
        "A": a.reshape(count, -1, a.shape[1])[list(order)].reshape(a.shape),
        "B": b.reshape(b.shape[0], -1, count)[:, :, list(order)].reshape(b.shape),
    }


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """By which rule."""
    if all("own" in one for one in told):
        return order_told(told, "expert")
    return listed(dict.fromkeys(str(one["orders"][0]) for one in told if one["orders"]), 3)


FAULT = ValueFault(
    code="LC147",
    name="delta-of-another-expert",
    severity="error",
    summary="the delta of another expert",
    help="number the experts through all shards, as the router does, before their factors are stacked, and merge again",
    inject=inject,
    tell=tell,
    causes=("M40",),
)

"""LC124 scales-exchanged

What it is
An adapter was merged with another one's scale or weight.

How it happens
A script reads alpha and r of the first adapter and uses them for all, or keeps those of the last one it read.
The weights were given in another order than the adapters.

How it is told
W' = W + sum of w_i s_i B_i A_i reproduces every element with the weights of two adapters exchanged, with
their scales exchanged, or with the scale or the weight of one of them used for all.

Evidence
scales_of, weights_of: for each adapter, counted from 1, whose scale and whose weight it was given.

What to do
Read alpha and r of each adapter from its own adapter_config.json, and give the weights in the order of the
adapters.

Seen in
huggingface/peft#3004, huggingface/peft#3013, huggingface/diffusers#14409
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

from lora_check.faults._findings import listed
from lora_check.faults._said import Told, each
from lora_check.faults._several import Members, given, members
from lora_check.types import Case, ValueFault

Order = tuple[int, ...]


def inject(case: Case) -> tuple[Case, ...]:
    """Scales, weights or both in another order, or one adapter's for all; each that gives other numbers."""
    every = members(case)
    if every.count < 2:
        return ()
    own = tuple(range(every.count))
    found: dict[tuple[float, ...], tuple[Order, Order]] = {_numbers(every, own, own): (own, own)}
    for weights, sources in _orders(own):
        found.setdefault(_numbers(every, weights, sources), (weights, sources))
    return tuple(_changed(case, every, *orders) for orders in list(found.values())[1:])


def _changed(case: Case, every: Members, weights: Order, sources: Order) -> Case:
    orders, own = {"weights_of": weights, "scales_of": sources}, tuple(range(every.count))
    told = {key: [every.adapters[i] + 1 for i in order] for key, order in orders.items() if order != own}
    return given(case, [every.weights[i] for i in weights], sources, told)


def _orders(own: Order) -> Iterator[tuple[Order, Order]]:
    """Whose weight and whose scale each adapter gets."""
    for order in (*_exchanges(own), *((one,) * len(own) for one in own)):
        yield own, order
        yield order, own
    for order in _exchanges(own):
        yield order, order


def _exchanges(own: Order) -> Iterator[Order]:
    for i, j in combinations(own, 2):
        yield tuple({i: j, j: i}.get(one, one) for one in own)


def _numbers(every: Members, weights: Order, sources: Order) -> tuple[float, ...]:
    return tuple(every.weights[w] * every.scales[s] for w, s in zip(weights, sources, strict=True))


def tell(told: Told) -> str:
    """'scale of adapter 1 used for all', 'weights of adapters 1 and 2 exchanged'."""
    said = each(_said(one) for one in told)
    return said[0] if len(said) == 1 else FAULT.summary


def _said(one: Mapping[str, list[int]]) -> str:
    return " and ".join(
        _phrase(key.removesuffix("s_of"), one[key]) for key in ("weights_of", "scales_of") if key in one
    )


def _phrase(noun: str, whose: list[int]) -> str:
    if len(set(whose)) == 1:
        return f"{noun} of adapter {whose[0]} used for all"
    moved = [str(one) for one, own in zip(whose, sorted(whose), strict=True) if one != own]
    return f"{noun}s of adapters {listed(sorted(moved))} exchanged"


FAULT = ValueFault(
    code="LC124",
    name="scales-exchanged",
    severity="error",
    summary="adapters merged with one another's scales or weights",
    help="read alpha and r of each adapter from its own configuration, and give the weights in the adapters' order",
    inject=inject,
    tell=tell,
    causes=("M24", "M30"),
)

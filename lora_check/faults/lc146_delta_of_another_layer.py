"""LC146 delta-of-another-layer

What it is
A target holds the delta of the same module in another layer.

How it happens
Layers were counted from another start: from 1, without the first dense ones, or anew in each pipeline stage. A loop ran
over names sorted as text (1, 10, 11, 2), or over a list turned round.

How it is told
W' = W + P reproduces every element, with P the delta of the module of that name in another layer. The layer before and
after, the reverse, the order as text and a count for each stage are tried first, then the nearest layers.

Evidence
own, of: the layer of the target, and that whose delta it holds. orders: the rules that lead from one to the other.

What to do
Find the factors of a module by its full name, with the base's own number of the layer, and merge again.

Seen in
No public report known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_check.faults._places import Place, beside, likely_sources, order_told, orders, place, with_factors_of
from lora_check.types import Case, ValueFault

MOST = 16
"""Layers that are tried for one tensor."""


def _layer(there: Place) -> int | None:
    return there.layer


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + P, P of the same module in another layer."""
    own = place(case.name).layer
    if own is None:
        return ()
    others = dict(beside(case, _layer))
    numbers = sorted({own, *others})
    chosen = likely_sources(own, numbers, MOST)
    told = ((others[of], {"own": own, "of": of, "orders": orders(own, of, numbers, "layer")}) for of in chosen)
    return with_factors_of(case, told)


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """By which rule."""
    return order_told(told, "layer")


FAULT = ValueFault(
    code="LC146",
    name="delta-of-another-layer",
    severity="error",
    summary="the delta of another layer",
    help="find the factors of a module by its full name, with the base's own number of the layer, and merge again",
    inject=inject,
    tell=tell,
    causes=("M40",),
)

"""LC128 cross-terms

What it is
The factors of several adapters were added before they were multiplied: (B1 + B2)(A1 + A2) has B1 A2 and B2 A1 in
it, which are nobody's delta.

How it happens
add_weighted_adapter with combination_type "linear", the default of many guides, takes roots of the weights on
both factors.
A script averages or adds the tensors of two adapter files by name, the weights on one factor or on both.

How it is told
W' = W + (sum of b_i B_i)(sum of a_i A_i) reproduces every element, with w_i s_i split between a_i and b_i in
halves by its root, or all on one side, or w_i on both, or equal shares of 1.

Evidence
on_a, on_b: what each adapter's A and B were multiplied by.

What to do
Merge the adapters one after the other, or combine them with combination_type "cat"; where "linear" was meant,
check with --combination linear.

Seen in
huggingface/peft#1155, huggingface/peft#3004, huggingface/peft#3111, huggingface/peft#2918, kohya-ss/sd-scripts#868
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import copysign, sqrt

from lora_check.faults._cases import deltas
from lora_check.types import Case, LoadedStep, Scale, ValueFault

Shares = tuple[float, ...]
PAIRS = (("A", "B"), ("embedding_A", "embedding_B"))


def inject(case: Case) -> tuple[Case, ...]:
    """One product of the added factors in place of the sum of products, for each way to share out the weights."""
    steps = deltas(case)
    pair = _pair(steps)
    if not pair:
        return ()
    bare = [replace(step.scale, weight=1.0).value for step in steps if step.scale]
    weights = [step.scale.weight for step in steps if step.scale]
    distinct: dict[tuple[float, ...], tuple[Shares, Shares]] = {}
    for a, b in _shares(weights, bare):
        distinct.setdefault(tuple(x * y for x in a for y in b), (a, b))
    kept = tuple(step for step in case.steps if step.recipe.copies)
    return tuple(
        replace(case, steps=(*kept, _added(steps, pair, a, b)), told={"on_a": list(a), "on_b": list(b)})
        for a, b in distinct.values()
    )


def _pair(steps: Sequence[LoadedStep]) -> tuple[str, ...]:
    """The roles of the two factors, where all steps are one formula over factors of one shape."""
    if len(steps) < 2 or len({step.adapter for step in steps}) < len(steps):
        return ()
    first = steps[0].recipe
    plain = first.adds and not first.prepare and first.method is None and not first.stacked
    pair = next((one for one in PAIRS if set(one) == steps[0].factors.keys()), ())
    alike = all(step.recipe is first and step.scale and not step.window for step in steps)
    shapes = {tuple(step.factors[role].shape for role in pair) for step in steps if set(pair) == step.factors.keys()}
    return pair if plain and alike and len(shapes) == 1 else ()


def _shares(weights: Sequence[float], scales: Sequence[float]) -> Iterator[tuple[Shares, Shares]]:
    """What the A and the B of each adapter are multiplied by."""
    whole = tuple(w * s for w, s in zip(weights, scales, strict=True))
    sizes = tuple(sqrt(abs(one)) for one in whole)
    ones = (1.0,) * len(whole)
    yield tuple(copysign(size, one) for size, one in zip(sizes, whole, strict=True)), sizes
    yield whole, ones
    yield ones, whole
    for shares in (tuple(weights), tuple(1 / len(whole) for _ in whole)):
        yield tuple(share * s for share, s in zip(shares, scales, strict=True)), shares


def _added(steps: Sequence[LoadedStep], pair: Sequence[str], *shares: Shares) -> LoadedStep:
    """One step with the weighted sums of the factors, and no scale beside them."""
    import torch

    factors = {}
    for role, parts in zip(pair, shares, strict=True):
        wide = [step.factors[role].to(torch.float64) * share for step, share in zip(steps, parts, strict=True)]
        factors[role] = sum(wide[1:], start=wide[0])
    rank = int(factors[pair[0]].shape[0])
    return replace(steps[0], factors=factors, scale=Scale(alpha=1.0, rank=1, default_alpha=1.0, default_rank=rank))


FAULT = ValueFault(
    code="LC128",
    name="cross-terms",
    severity="error",
    summary="factors of several adapters added before they were multiplied",
    help="merge the adapters one after the other or with combination_type cat; if linear was meant, say --combination",
    inject=inject,
    causes=("M30", "M46"),
)

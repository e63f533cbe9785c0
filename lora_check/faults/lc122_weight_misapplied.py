"""LC122 weight-misapplied

What it is
The weight w that --weights tells is in the delta as w^2 or as its root: it was multiplied into both factors, or
its root into one.

How it happens
A merging script multiplies the ratio into the up and into the down matrix (kohya-ss/sd-scripts, LoRA for
diffusers).
A script takes the root for each of two factors, as PEFT does, and applies it to one.

How it is told
W' = W + w^2 (alpha / r) B A reproduces every element, or the same with the root of w; with several
adapters, each has its own.

Evidence
power: 2 or 0.5, that of the weight which was found. scale, right: the scale that was used, and the right one.

What to do
Multiply the weight into one factor only, once, and merge again.

Seen in
kohya-ss/sd-scripts#868, cloneofsimo/lora#187
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import copysign, sqrt

from lora_check.faults._cases import rescaled
from lora_check.faults._said import Told, each
from lora_check.faults._several import combined, members, resettled
from lora_check.types import Case, Scale, ValueFault

SQUARED, ROOTED = 2.0, 0.5


def inject(case: Case) -> tuple[Case, ...]:
    """w^2 or sqrt(w) in place of w, where the two differ."""
    if all(weight in (0.0, 1.0) for weight in members(case).weights):
        return ()
    step = combined(case)
    if step is None:
        return (*rescaled(case, _squared, power=SQUARED), *rescaled(case, _rooted, power=ROOTED))
    if step.site is None or step.site.settings["combination"].of != "factors":
        return ()
    return (replace(resettled(case, step, shares=_on_both), told={"power": SQUARED}),)


def _squared(scale: Scale) -> Scale:
    return replace(scale, weight=scale.weight**2)


def _rooted(scale: Scale) -> Scale:
    return replace(scale, weight=copysign(sqrt(abs(scale.weight)), scale.weight))


def _on_both(weights: Sequence[float], scales: Sequence[float]) -> tuple[list[float], list[float]]:
    """Of A w sqrt(|s|) with the sign of s, of B w sqrt(|s|)."""
    roots = [sqrt(abs(scale)) for scale in scales]
    pairs = list(zip(weights, roots, scales, strict=True))
    return [w * copysign(root, scale) for w, root, scale in pairs], [w * root for w, root, _ in pairs]


def tell(told: Told) -> str:
    """'weight squared', 'root of the weight used'."""
    powers = each(one.get("power") for one in told)
    if powers == [ROOTED]:
        return "root of the weight used in place of the weight"
    return "weight multiplied into both factors, and so squared" if powers == [SQUARED] else FAULT.summary


FAULT = ValueFault(
    code="LC122",
    name="weight-misapplied",
    severity="error",
    summary="weight of --weights squared, or its root used",
    help="multiply the weight into one factor only, once, and merge again",
    inject=inject,
    tell=tell,
    causes=("M30", "M46"),
)

"""LC125 scale-formula-mistaken

What it is
alpha and r were put together the wrong way: alpha r, r / alpha, 1 / r or alpha / r^2.

How it happens
A re-implementation of the merge turns the fraction over or multiplies, or leaves alpha out.
One step divides alpha by r, or a converter stores alpha / r as alpha, and a later step divides again.

How it is told
W' = W + c B A reproduces every element for one of these numbers; under rsLoRA the root of r takes the place of
r, but in alpha / r^2, which is alpha / r there and LC107. A strength left on while merging can give the
same number: the scale that was used is told.

Evidence
formula: the one that was used. scale, right: what it gives, and the right scale.

What to do
Multiply by alpha / r, or by alpha / sqrt(r) under rsLoRA, once; and leave no other strength on.

Seen in
Blaizzy/mlx-vlm#845, hao-ai-lab/FastVideo#870, verl-project/verl#3050, verl-project/verl#5325
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import sqrt

from lora_check.faults._cases import rescaled
from lora_check.faults._said import Told, instead, ways
from lora_check.types import Case, Scale, ValueFault

FORMULAS: dict[str, Callable[[float, float], float]] = {
    "alpha * r": lambda alpha, r: alpha * r,
    "r / alpha": lambda alpha, r: r / alpha if alpha else 0.0,
    "1 / r": lambda alpha, r: 1 / r,
    "alpha / r^2": lambda alpha, r: alpha / r**2,
}
"""With sqrt(r) for r under rsLoRA."""


def inject(case: Case) -> tuple[Case, ...]:
    """Each formula that gives another number than the right one, and than those before it."""
    found: dict[tuple[float, ...], Case] = {}
    for name, formula in FORMULAS.items():
        for changed in rescaled(case, partial(_by, formula=formula), formula=name):
            found.setdefault(tuple(step.s for step in changed.steps), changed)
    return tuple(found.values())


def _by(scale: Scale, formula: Callable[[float, float], float]) -> Scale:
    plain = scale.rule == "alpha/r"
    if not plain and formula is FORMULAS["alpha / r^2"]:
        return scale
    return replace(scale, alpha=formula(scale.alpha, scale.rank if plain else sqrt(scale.rank)), rank=1)


def tell(told: Told) -> str:
    """'scale by another formula: alpha * r, 60 in place of 1.667'."""
    return f"{FAULT.summary}: {', '.join(part for part in (ways(told, 'formula'), instead(told)) if part)}"


FAULT = ValueFault(
    code="LC125",
    name="scale-formula-mistaken",
    severity="error",
    summary="scale by another formula",
    help="multiply by alpha / r, or by alpha / sqrt(r) under rsLoRA, once, and leave no other strength on",
    inject=inject,
    tell=tell,
    causes=("M10", "M46"),
)

"""LC109 pattern-ignored

What it is
The adapter gives some modules their own alpha or rank, and the merge used the general ones.

How it happens
The merge reads r and lora_alpha only, and neither rank_pattern nor alpha_pattern.
The patterns are matched by another rule than PEFT's, so that they miss.

How it is told
W' = W + s B A reproduces every element with s made of the general alpha and r, of the general alpha alone,
or of the general r alone. Modules that no pattern names are right.

Evidence
over_budget: elements of the worst target that no honest merge can have written. survival: the scale used
over the right one.

What to do
Merge with a tool that reads rank_pattern and alpha_pattern, or take r from the shape of each lora_A.

Seen in
huggingface/peft#2194, huggingface/diffusers#14409, axolotl-ai-cloud/axolotl#3673, huggingface/peft#1746
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import rescaled
from lora_check.types import Case, Scale, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """s made of the general alpha and rank, the general alpha, the general rank: each that is another number."""
    distinct: dict[tuple[float, ...], Case] = {}
    for change in (_both, _alpha, _rank):
        for other in rescaled(case, change):
            distinct.setdefault(tuple(step.s for step in other.steps), other)
    return tuple(distinct.values())


def _both(scale: Scale) -> Scale:
    return replace(scale, alpha=scale.default_alpha, rank=scale.default_rank)


def _alpha(scale: Scale) -> Scale:
    return replace(scale, alpha=scale.default_alpha)


def _rank(scale: Scale) -> Scale:
    return replace(scale, rank=scale.default_rank)


FAULT = ValueFault(
    code="LC109",
    name="pattern-ignored",
    severity="error",
    summary="rank_pattern or alpha_pattern ignored",
    help="merge with a tool that reads rank_pattern and alpha_pattern",
    inject=inject,
)

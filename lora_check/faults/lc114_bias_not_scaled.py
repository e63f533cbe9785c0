"""LC114 bias-not-scaled

What it is
The trained bias of lora_B was added to a bias without the scale that the adapter applies to it.

How it happens
PEFT 0.14 and 0.15 merge it so, while their own unmerged forward scales it; 0.16 and later scale it in both.
PEFT's merge into 8-bit and 4-bit layers of bitsandbytes does so to this day.

How it is told
b' = b + b_B reproduces every element of the bias.

Evidence
over_budget: elements of the worst target that no honest merge can have written.

What to do
Merge again with PEFT 0.16 or later, into a base that is not quantised.

Seen in
huggingface/peft#2489
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.types import Case, LoadedStep, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """s = 1 for the bias of lora_B, and for nothing else."""
    steps = tuple(_unscaled(step) for step in case.steps)
    return () if all(one.s == other.s for one, other in zip(steps, case.steps, strict=True)) else (replace(case, steps=steps),)


def _unscaled(step: LoadedStep) -> LoadedStep:
    if step.scale is None or step.recipe.name != "lora-bias":
        return step
    return replace(step, scale=replace(step.scale, alpha=1.0, rank=1))


FAULT = ValueFault(
    code="LC114",
    name="bias-not-scaled",
    severity="error",
    summary="the bias of lora_B added without its scale (PEFT 0.14 and 0.15)",
    help="merge again with PEFT 0.16 or later, into a base that is not quantised",
    inject=inject,
)

"""LC105 delta-only

What it is
The target holds the delta without the base under it.

How it happens
The script wrote get_delta_weight() in place of the weight, or summed into a fresh tensor.
The base was on the meta device or offloaded, and came out as zeros.

How it is told
W' = s B A, over a base of zeros, reproduces every element.

Evidence
over_budget: elements of the worst target that no honest merge can have written, commonly all of them.

What to do
Load the base fully into memory, add the delta to it, and save again.

Seen in
No public report known.
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import deltas
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """W' = s B A; a DoRA magnitude has no meaning without a base."""
    steps = deltas(case)
    if not steps or any(step.recipe.apply for step in steps):
        return ()
    zeros = case.base.new_zeros(()).expand(case.base.shape)  # one number: costs no memory
    return (replace(case, base=zeros, steps=steps),)


FAULT = ValueFault(
    code="LC105",
    name="delta-only",
    severity="error",
    summary="delta written without the base",
    help="load the base fully into memory before it is merged and saved",
    inject=inject,
    causes=("M51",),
)

"""LC104 transposed-delta

What it is
The delta was added with its two axes exchanged.

How it happens
The layer keeps its weight as (in, out), as GPT-2's Conv1D does, and the merge took it for (out, in); or the
reverse.
fan_in_fan_out was not read, or a converter took (r, in) for (in, r).

How it is told
W' = W + s (B A)^T reproduces every element. Only a square weight takes the mistake without an error, so in
one model it can sit in the square projections alone.

Evidence
over_budget: elements of the worst target that no honest merge can have written. survival: about 0, the two
deltas have little in common.

What to do
Merge again with fan_in_fan_out set as the layer keeps its weight.

Seen in
predibase/lorax#106, axolotl-ai-cloud/axolotl#3095, microsoft/LoRA#103, ml-explore/mlx-lm#1120
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import deltas
from lora_check.types import Case, LoadedStep, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + s (B A)^T, over a square weight."""
    rows, columns = case.base.shape
    if rows != columns or rows == 1 or not any(step.recipe.flipped for step in deltas(case)):
        return ()
    return (replace(case, steps=tuple(_flipped(step) for step in case.steps)),)


def _flipped(step: LoadedStep) -> LoadedStep:
    return replace(step, flipped=not step.flipped) if step.recipe.flipped else step


FAULT = ValueFault(
    code="LC104",
    name="transposed-delta",
    severity="error",
    summary="delta transposed",
    help="merge again with fan_in_fan_out set as the layer keeps its weight",
    inject=inject,
    causes=("M23",),
)

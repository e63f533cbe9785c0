"""LC101 adapter-not-applied

What it is
The target holds the base: the merge left no trace in it.

How it happens
The merge step was skipped, or ran on a copy, and the script saved the model it had before: verl, alpaca-lora,
TRL, mlx-examples, Unsloth. What merge_and_unload() returns was thrown away.
The model was merged, unmerged for more training, and then saved or sent on; or the state dict was taken first and is
an alias that unmerging changed too: TRL's and verl's way to vLLM.
The adapter's keys did not match the model's, so that B stayed at zero while loading (LC509, LC005, LC205).

How it is told
W' = W, every step that adds left out and the saved tensors kept, reproduces every element, or W' = (W + s B A) - s B A
does, whose roundings remain; and the delta would show: one too small for the storage dtype is LC302, an adapter of
zeros LC004. Without such roundings files cannot tell how it came about: clone the merged model's state dict and compare
it with the base before it is saved. Equal: not merged, or B is zero in memory. Different: unmerged afterwards.

Evidence
over_budget: elements of the worst target that no honest merge can have written. survival: about 0.

What to do
Keep what merge_and_unload() returns and save that.

Seen in
verl-project/verl#7285, verl-project/verl#3087, huggingface/trl#386, tloen/alpaca-lora#19, ml-explore/mlx-examples#425,
huggingface/trl#2856, huggingface/trl#2873, huggingface/peft#918, huggingface/peft#2289
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.faults._cases import copies, deltas
from lora_check.types import Case, LoadedStep, ValueFault

UNMERGED = "unmerged"
WIDE = ("float32", "float64")
"""What is unmerged in fewer bits is visibly blurred, which is LC164."""


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W; and in 32 bits or more W' = (W + s B A) - s B A, each sum stored, which is W but for its roundings."""
    if not deltas(case):
        return ()
    untouched = replace(case, steps=copies(case))
    back = tuple(_taken_back(step) for step in reversed(deltas(case)))
    if case.storage not in WIDE or case.grid is not None or not all(one.recipe.adds and one.scale for one in back):
        return (untouched,)
    return untouched, replace(case, steps=(*case.steps, *back), told={UNMERGED: "after it had been merged"})


def _taken_back(step: LoadedStep) -> LoadedStep:
    return replace(step, scale=replace(step.scale, alpha=-step.scale.alpha)) if step.scale else step


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """'merged and unmerged again', if the roundings show it in any tensor."""
    return "merged and unmerged again" if any(UNMERGED in one for one in told) else FAULT.summary


FAULT = ValueFault(
    code="LC101",
    name="adapter-not-applied",
    severity="error",
    summary="adapter not applied",
    help="save the model that merge_and_unload() returns, before anything unmerges it",
    inject=inject,
    tell=tell,
    causes=("M01", "M43"),
)

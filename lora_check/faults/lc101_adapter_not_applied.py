"""LC101 adapter-not-applied

What it is
The target holds the base: the merge left no trace in it.

How it happens
The merge step was skipped, or ran on a copy, and the script saved the model it had before.
merge_and_unload() was called and its return value thrown away.
The adapter's keys did not match the model's, so that B stayed at zero while loading (see LC005, LC205).

How it is told
W' = W, every step that adds left out and the saved tensors kept, reproduces every element, and the delta
would show: a delta too small for the storage dtype is LC302, an adapter of zeros LC004.

Evidence
over_budget: elements of the worst target that no honest merge can have written. survival: about 0, the
fine-tune is not there.

What to do
Keep what merge_and_unload() returns and save that.

Seen in
verl-project/verl#7285, verl-project/verl#3087, huggingface/trl#386, tloen/alpaca-lora#19,
vllm-project/vllm#39278
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import copies, deltas
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W."""
    return (replace(case, steps=copies(case)),) if deltas(case) else ()


FAULT = ValueFault(
    code="LC101",
    name="adapter-not-applied",
    severity="error",
    summary="adapter not applied",
    help="save the model that merge_and_unload() returns",
    inject=inject,
)

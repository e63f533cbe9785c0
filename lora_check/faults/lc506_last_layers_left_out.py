"""LC506 last-layers-left-out

What it is
The adapter was merged in the first layers of a stack, and from one layer on every target holds the base.

How it happens
The model did not fit: with device_map="auto" the last layers were on the CPU or on disk while it was merged, and
what is offloaded is not merged, or not saved (PEFT with accelerate, LLaMA-Factory).
The merge stopped half-way, for want of memory or time, over a copy of the base.
The last pipeline stage did not send its adapter.

How it is told
Two or more layers at the end of a stack, and no others of it, have every target told as not applied (LC101).
Where just these lie in files of their own, the finding is LC504.

Evidence
layers: for each stack, which layers hold the base. targets: how many targets there are in all.

What to do
Merge again with the whole model on one device: device_map=None, or on the CPU.

Seen in
hiyouga/LlamaFactory#3096, turbo-llm/turbo-alignment#66, unslothai/unsloth-zoo#808
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.extent import layers_of
from lora_check.faults._findings import found
from lora_check.faults._left_out import left_at_base, left_out, targets
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with the last layers of each stack that ends so."""
    left = left_out(plan, comparisons).get("LC506", [])
    if not left:
        return ()
    names = [one.tensor for one in left]
    message = f"the merge ends before the last layers: {left_at_base(left, comparisons)}"
    return (found(FAULT, message, names, layers=layers_of(names), targets=targets(comparisons)),)


FAULT = PatternFault(
    code="LC506",
    name="last-layers-left-out",
    severity="error",
    summary="the last layers left out",
    help="merge again with the whole model on one device, such as the CPU",
    detect=detect,
    absorbs=("LC101",),
    verdict=Verdict.REFUTED,
    causes=("M25", "M51"),
)

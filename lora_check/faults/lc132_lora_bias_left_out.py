"""LC132 lora-bias-left-out

What it is
The trained bias of lora_B is not in the biases of the merge, while the weights have their delta.

How it happens
The exporter folds lora_A and lora_B and does not know lora_B.bias, which lora_bias=True adds.
The base was loaded into a class without these biases, and they were put back from its files.

How it is told
b' = b reproduces every element of each bias that holds the base (LC101), and some weight has its delta.

Evidence
biases: how many there are.

What to do
Merge with a tool that knows lora_bias, such as PEFT 0.16 or later.

Seen in
huggingface/peft#2237, huggingface/peft#2716
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, many
from lora_check.types import Comparison, Finding, PatternFault, Plan

NOT_APPLIED = "LC101"


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding, if every target that holds the base is such a bias, and some weight does not."""
    left = [one for one in comparisons if one.code == NOT_APPLIED]
    weights = [one for one in comparisons if one.kind == "target" and "lora-bias" not in one.recipe]
    if not left or not weights or any("lora-bias" not in one.recipe for one in left):
        return ()
    message = f"the bias of lora_B left out in {many(len(left), 'target')}"
    return (found(FAULT, message, (one.tensor for one in left), biases=len(left)),)


FAULT = PatternFault(
    code="LC132",
    name="lora-bias-left-out",
    severity="error",
    summary="the bias of lora_B left out",
    help="merge with a tool that knows lora_bias, such as PEFT 0.16 or later",
    detect=detect,
    absorbs=(NOT_APPLIED,),
    causes=("M33",),
)

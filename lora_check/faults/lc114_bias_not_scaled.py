"""LC114 bias-not-scaled

What it is
The trained bias of lora_B was added to a bias without the scale that the adapter applies to it.

How it happens
PEFT 0.14 and 0.15 merge it so, while their own unmerged forward scales it; 0.16 and later scale it in both.
PEFT's merge into 8-bit and 4-bit layers of bitsandbytes does so to this day; a bias left out is LC132.

How it is told
b' = b + b_B reproduces every element of each bias that is wrong (LC111), and no weight is wrong so.

Evidence
biases: how many there are.

What to do
Merge again with PEFT 0.16 or later, into a base that is not quantised.

Seen in
huggingface/peft#2486, huggingface/peft#2489, huggingface/peft#3741, huggingface/peft#3757
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, many
from lora_check.types import Comparison, Finding, PatternFault, Plan

SCALE_ONE = "LC111"


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding, if every tensor whose scale was left out is such a bias."""
    unscaled = [one for one in comparisons if one.code == SCALE_ONE]
    if not unscaled or any("lora-bias" not in one.recipe for one in unscaled):
        return ()
    count = many(len(unscaled), "target")
    message = f"the bias of lora_B without its scale, as PEFT 0.14 and 0.15 merge it, in {count}"
    return (found(FAULT, message, (one.tensor for one in unscaled), biases=len(unscaled)),)


FAULT = PatternFault(
    code="LC114",
    name="bias-not-scaled",
    severity="error",
    summary="the bias of lora_B added without its scale",
    help="merge again with PEFT 0.16 or later, into a base that is not quantised",
    detect=detect,
    absorbs=(SCALE_ONE,),
    causes=("M33",),
)

"""LC116 ia3-bias-left-out

What it is
The weights of IA3 targets are scaled, and their biases, which the same vector scales, hold the base.

How it happens
PEFT 0.4 and 0.5 merge it so, while their own unmerged forward scales the whole output; 0.6 and later scale both.
A re-implementation of the merge forgets the bias.

How it is told
Every target that holds the base (LC101) is the bias of an IA3 target whose weight is right.

Evidence
biases: how many there are.

What to do
Merge again with PEFT 0.6 or later.

Seen in
No public report known.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, many
from lora_check.types import Comparison, Finding, PatternFault, Plan

NOT_APPLIED, RECIPE = "LC101", "ia3-bias"


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding, if every target that holds the base is such a bias."""
    left = [one for one in comparisons if one.code == NOT_APPLIED]
    if not left or any(one.recipe != RECIPE for one in left):
        return ()
    message = f"the bias of IA3 left as it is in BASE, as PEFT 0.4 and 0.5 merge it, in {many(len(left), 'target')}"
    return (found(FAULT, message, (one.tensor for one in left), biases=len(left)),)


FAULT = PatternFault(
    code="LC116",
    name="ia3-bias-left-out",
    severity="error",
    summary="the bias of IA3 targets left out of the merge",
    help="merge again with PEFT 0.6 or later",
    detect=detect,
    absorbs=(NOT_APPLIED,),
)

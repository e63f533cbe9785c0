"""LC311 unknown-scales

What it is
Quantised targets whose codes are right for the scales beside them, and whose scales are of no known making.

How it happens
A tool chose the scale of each block by calibration or by search, and not by its largest element.
The scales were changed after the merge, or belong to another tensor: codes alone cannot tell.

How it is told
A scale is neither the largest modulus of an honest merge divided by the largest code, nor the power of two above that,
nor the scale of BASE.

Evidence
blocks: how many blocks of how many targets have such a scale.

What to do
Quantise the merged model again with scales taken from the largest element of each block, or check the unquantised one.

Seen in
No public report known.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, many
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with every such tensor that is not refuted."""
    strange = [one for one in comparisons if one.strange and one.verdict is Verdict.INCONCLUSIVE]
    if not strange:
        return ()
    blocks = sum(one.strange for one in strange)
    message = f"the scales of {many(blocks, 'block')} in {many(len(strange), 'tensor')} follow no known rule"
    return (found(FAULT, message, (one.tensor for one in strange), blocks=blocks),)


FAULT = PatternFault(
    code="LC311",
    name="unknown-scales",
    severity="info",
    summary="quantised tensors whose scales follow no known rule",
    help="quantise the merged model again with scales taken from the largest element of each block",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M17", "M28"),
)

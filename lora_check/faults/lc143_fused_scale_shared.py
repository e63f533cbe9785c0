"""LC143 fused-scale-shared

What it is
Fused projections, and they alone, have the delta of their parts at 1/n of its scale, n the number of parts.

How it happens
The adapters of q, k and v were fused block by block: lora_A three times as high, the rank three times as large, and
alpha left as it was, so that alpha / r fell to a third; with gate and up to a half. Seen in converters of diffusion
trainers and in exports to engines that fuse. The reverse, alpha multiplied and the rank kept, gives n times the scale.

How it is told
A factor of 1/n or n is fitted (LC110) or replayed (LC102) in every fused projection, and nowhere else. Where all
targets have it, the scale itself is wrong and LC110 tells so.

Evidence
factor: the fitted factor; 1 would be right. parts: n.

What to do
Multiply alpha by the number of parts wherever the rank was, and convert again.

Seen in
mflux-community/mflux#459, mflux-community/mflux#423, kohya-ss/sd-scripts#2204, Comfy-Org/ComfyUI#14987
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from lora_check.faults._findings import found, many
from lora_check.faults._rows import FUSED_ATTENTION, FUSED_GATES, family
from lora_check.faults._scales import SCALED, factor_fits, telling
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict

PARTS = ((FUSED_ATTENTION, 3), (FUSED_GATES, 2))


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding for each kind of fused projection that has 1/n or n times its delta, if no other target has."""
    targets = telling(comparisons)
    fused = {one.tensor for one in targets if family(one.tensor) in FUSED_ATTENTION + FUSED_GATES}
    others = [one for one in targets if one.tensor not in fused]
    if not others or any(one.code in SCALED for one in others):
        return ()
    findings = []
    for names, parts in PARTS:
        members = [one for one in targets if family(one.tensor) in names]
        for factor in (Fraction(1, parts), Fraction(parts)):
            if members and all(factor_fits(one, float(factor)) for one in members):
                message = f"{factor} of the scale in {many(len(members), 'fused projection')} of {parts} parts each"
                tensors = (one.tensor for one in members)
                findings.append(found(FAULT, message, tensors, factor=float(factor), parts=parts))
    return tuple(findings)


FAULT = PatternFault(
    code="LC143",
    name="fused-scale-shared",
    severity="error",
    summary="the scale of fused projections divided by the number of their parts",
    help="multiply alpha by the number of parts wherever the rank was, and convert again",
    detect=detect,
    absorbs=SCALED,
    verdict=Verdict.REFUTED,
    causes=("M14",),
)

"""LC302 delta-below-storage-resolution

What it is
The merge is right as far as the file can hold it, and the file cannot hold much of the fine-tune.

How it happens
The delta is small against the weight: rounded to bf16, most elements stay what they were. Small adapters,
short training and RL updates are the usual case.

How it is told
Either an honest merge writes the very bits of the base, so 'merged' and 'not merged' are one file; or rounding
took more of the delta than it left: less than half of it survives, or the noise is stronger than the delta itself (a
signal-to-noise ratio below 0 dB). Of codes, LC312 tells the latter.

Evidence
survival: the share of the delta that the stored bits keep, over all these targets together; 1 is all of it.
snr_db: the lowest signal-to-noise ratio among them.

What to do
Store the merged model in fp32 or fp16, or serve the adapter unmerged.

Seen in
NVIDIA-NeMo/Automodel#3845, NVIDIA-NeMo/RL#3696, huggingface/trl#6688, huggingface/peft#1388
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, many
from lora_check.faults._low_resolution import in_codes, lost
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding for targets that cannot show the delta, one for those that lost most of it."""
    targets = [one for one in comparisons if one.kind == "target"]
    honest = [one for one in targets if one.verdict is not Verdict.REFUTED]
    vanished = [one for one in honest if one.vanished]
    weak = [one for one in honest if not one.vanished and lost(one) and not in_codes(one)]
    findings = []
    if vanished:
        message = f"the storage dtype cannot show the delta in {len(vanished)} of {many(len(targets), 'target')}"
        findings.append(found(FAULT, f"{message}: merged or not is the same bits", (one.tensor for one in vanished)))
    if weak:
        message = f"storage took more of the fine-tune than it left in {len(weak)} of {many(len(targets), 'target')}"
        worst = min(one.snr_db for one in weak if one.snr_db is not None)
        findings.append(found(FAULT, message, (one.tensor for one in weak), survival=_survival(weak), snr_db=worst))
    return tuple(findings)


def _survival(targets: Sequence[Comparison]) -> float:
    """<merged - base, delta> / <delta, delta>, summed over all of them."""
    return sum(one.overlap for one in targets) / sum(one.signal for one in targets)


FAULT = PatternFault(
    code="LC302",
    name="delta-below-storage-resolution",
    severity="info",
    summary="storage took more of the fine-tune than it left",
    help="store the merged model in fp32 or fp16, or serve the adapter unmerged",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M07", "M21"),
)

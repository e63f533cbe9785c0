"""LC312 delta-below-quantisation-step

What it is
The merge into a quantised model is right as far as its codes can hold it, and they hold little of the fine-tune.

How it happens
The weight plus the delta was quantised again with as few bits as the base has (PEFT with bitsandbytes, mlx-lm fuse,
mflux, llama.cpp). The step of the codes is larger than the delta, so most codes, or all of them, stay what they were:
the formula is right and the fused model behaves like the base.

How it is told
The codes, or the numbers that they were decoded to again, are those of an honest merge. Either BASE itself would pass
for one, or the codes took more of the delta than they left: less than half of it survives, or the noise is stronger
than the delta itself (a signal-to-noise ratio below 0 dB).

Evidence
survival: the share of the delta that the codes keep, over all these targets. snr_db: the lowest signal-to-noise ratio.
step_over_delta: the mean step, sqrt(12) of what was lost, against the delta. unmoved: targets in which BASE would pass.

What to do
Merge into the 16-bit original and store that, quantise with more bits, or serve the adapter beside the quantised base.

Seen in
ml-explore/mlx-lm#1564, ml-explore/mlx-lm#1172, mflux-community/mflux#668, mflux-community/mflux#665,
axolotl-ai-cloud/axolotl#3803, axolotl-ai-cloud/axolotl#3753, johnsmith0031/alpaca_lora_4bit#109,
ggml-org/llama.cpp#3333, ml-explore/mlx-examples#488, huggingface/peft#851
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, many
from lora_check.faults._low_resolution import in_codes, lost
from lora_check.types import Comparison, Finding, PatternFault, Plan, Verdict


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding for the quantised targets that lost most of the delta, or all of it."""
    targets = [one for one in comparisons if one.kind == "target" and in_codes(one)]
    honest = [one for one in targets if one.verdict is not Verdict.REFUTED and one.signal > 0]
    small = [one for one in honest if one.vanished or lost(one)]
    if not small:
        return ()
    signal, noise = sum(one.signal for one in small), sum(one.noise for one in small)
    ratio = (12 * noise / signal) ** 0.5
    message = f"the step of the codes is {ratio:.2g} times the delta in {len(small)} of {many(len(targets), 'target')}"
    worst = min((one.snr_db for one in small if one.snr_db is not None), default=None)
    survival = sum(one.overlap for one in small) / signal
    unmoved = sum(one.vanished for one in small)
    evidence = {"survival": survival, "snr_db": worst, "step_over_delta": ratio, "unmoved": unmoved}
    return (found(FAULT, f"{message}: little or nothing of it is left", (one.tensor for one in small), **evidence),)


FAULT = PatternFault(
    code="LC312",
    name="delta-below-quantisation-step",
    severity="warning",
    summary="the step of the codes is larger than the delta",
    help="store the merge in 16 bits, quantise it with more bits, or serve the adapter unmerged",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M07",),
)

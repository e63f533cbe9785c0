"""LC313 container-without-merge

What it is
The targets lie in GPTQ or AWQ codes in BASE and in MERGED alike, and no library merges an adapter into these.

How it happens
PEFT says 'Cannot merge LORA layers when the model is gptq quantized', somebody takes the line out, and the base is
saved and served as the merged model. With AWQ it is the same.
QA-LoRA's scripts add the delta to the zero points instead, which are packed too: the sums run over into their
neighbours.

How it is told
Both sides keep a target in the same container. Its codes are not decoded here, so nothing is verified and nothing
refuted; but they are compared byte by byte, and where they are those of BASE, nothing of the adapter is in them.

Evidence
containers: how many targets lie in each. targets: how many there are in all. unmoved: how many hold the codes of BASE.

What to do
Merge into the 16-bit original, check that merge, and quantise it afterwards; or serve the adapter unmerged.

Seen in
huggingface/peft#1853, huggingface/optimum#1287, AutoGPTQ/AutoGPTQ#260, QwenLM/Qwen#542, QwenLM/Qwen#1318,
QwenLM/Qwen-VL#281, hiyouga/LlamaFactory#5625, hiyouga/LlamaFactory#1545, modelscope/ms-swift#2344,
yuhuixu1993/qa-lora#42, yuhuixu1993/qa-lora#46
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lora_check.faults._findings import found, listed, many
from lora_check.types import Comparison, Finding, Pairing, PatternFault, Plan, Verdict

CONTAINERS = ("GPTQ", "AWQ")


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding with every target that stayed in a container."""
    kept = {one.merged.name: one.merged.codes for one in plan.targets if _is_kept(one)}
    if not kept:
        return ()
    count = len(plan.targets)
    which = f"all {count} targets" if len(kept) == count > 1 else f"{len(kept)} of {many(count, 'target')}"
    containers = Counter(kept.values())
    message = f"{which} still lie in {listed(containers)}, as in BASE: an adapter cannot be merged into this container"
    unmoved = sum(one.tensor in kept and "unmoved" in one.told for one in comparisons)
    if unmoved:
        which = "all of them hold" if unmoved == len(kept) else f"{unmoved} of them hold"
        message += f", and {which} the codes of BASE byte for byte: nothing was merged"
    return (found(FAULT, message, kept, containers=dict(containers), targets=count, unmoved=unmoved),)


def _is_kept(pairing: Pairing) -> bool:
    """The same container on both sides."""
    return pairing.base is not None and pairing.base.codes == pairing.merged.codes in CONTAINERS


FAULT = PatternFault(
    code="LC313",
    name="container-without-merge",
    severity="warning",
    summary="targets in a container that no adapter can be merged into",
    help="merge into the 16-bit original, check that merge, and quantise it afterwards",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M28", "M31", "M52"),
)

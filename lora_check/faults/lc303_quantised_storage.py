"""LC303 quantised-storage

What it is
A target is stored in a format whose rounding is not modelled, so it is neither verified nor refuted.

How it happens
BASE or MERGED is quantised: FP8, or integer codes of bitsandbytes, GPTQ or AWQ.
A merge into such a file rounds with steps that are often larger than the delta.

How it is told
By headers alone: the dtype of the target, in BASE or in MERGED, is not float64, float32, float16 or
bfloat16.
Bystanders and saved tensors in such a dtype are compared all the same, bit for bit.

Evidence
dtypes: the formats met, and how many tensors are in each.

What to do
Merge into the unquantised base, check that merge, and quantise it afterwards.

Seen in
ml-explore/mlx-lm#1564, axolotl-ai-cloud/axolotl#3803, huggingface/peft#1853, unslothai/unsloth-zoo#803
"""

from __future__ import annotations

from collections import Counter

from lora_check.faults._findings import found, listed, many
from lora_check.types import FLOATS, Finding, Pairing, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every such target."""
    strange = {one.merged.name: dtype for one in plan.pairings if (dtype := _strange(one))}
    if not strange:
        return ()
    dtypes = Counter(strange.values())
    message = f"{many(len(strange), 'tensor')} stored as {listed(dtypes)}, whose rounding is not modelled"
    return (found(FAULT, message, strange, dtypes=dict(dtypes)),)


def _strange(pairing: Pairing) -> str:
    """The unmodelled dtype of a tensor that would have to be computed in it, if any."""
    if pairing.kind != "target" and not pairing.undecidable:
        return ""
    return next((meta.dtype for meta in (pairing.merged, pairing.base) if meta and meta.dtype not in FLOATS), "")


FAULT = PlanFault(
    code="LC303",
    name="quantised-storage",
    severity="info",
    summary="targets stored in a format whose rounding is not modelled",
    help="merge into the unquantised base, check that merge, and quantise it afterwards",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
)

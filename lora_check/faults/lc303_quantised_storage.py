"""LC303 quantised-storage

What it is
A target is stored in a format that is not decoded, or whose rounding is not modelled: neither verified nor refuted.

How it happens
BASE or MERGED is quantised with GPTQ, AWQ, HQQ or the like. PEFT cannot merge into most of these, and people who
comment the error out ship the base: LC313 says where both lie in one container.
MERGED is in MXFP4 or in blocks of GGUF, or in a raw integer or 8-bit dtype without scales.

How it is told
By headers alone: the names and dtypes of what lies there, in BASE or in MERGED.
bitsandbytes (4-bit and int8) and fp8 with scales are decoded and compared in code space, MXFP4 and GGUF are decoded as
BASE. Bystanders and saved tensors are compared all the same, byte for byte.

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
from lora_check.types import FLOATS, Finding, Pairing, Plan, PlanFault, TensorMeta, Verdict

UNMODELLED = "whose rounding is not modelled"


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding for each reason, with every such target."""
    reasons: dict[str, dict[str, str]] = {}
    for one in plan.pairings:
        if (meta := _strange(one)) is not None:
            reasons.setdefault(meta.sealed or UNMODELLED, {})[one.merged.name] = meta.stored_as
    findings = []
    for reason, strange in reasons.items():
        dtypes = Counter(strange.values())
        message = f"{many(len(strange), 'tensor')} stored as {listed(dtypes)}, {reason}"
        findings.append(found(FAULT, message, strange, dtypes=dict(dtypes)))
    return tuple(findings)


def _strange(pairing: Pairing) -> TensorMeta | None:
    """The side of a tensor that would have to be computed in an unmodelled dtype, if any."""
    if pairing.kind != "target" and not pairing.undecidable:
        return None
    return next((meta for meta in (pairing.merged, pairing.base) if meta and meta.dtype not in FLOATS), None)


FAULT = PlanFault(
    code="LC303",
    name="quantised-storage",
    severity="info",
    summary="targets stored in a format whose rounding is not modelled",
    help="merge into the unquantised base, check that merge, and quantise it afterwards",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M07", "M28", "M31", "M52"),
)

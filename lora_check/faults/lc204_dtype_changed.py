"""LC204 dtype-changed

What it is
MERGED is stored in another dtype than BASE. That is honest; it is told because it costs memory or
precision.

How it happens
The model was loaded in the loader's default dtype, often fp32, and saved so: twice the size and nothing
gained.
The export script calls .half(), so a bf16 model became fp16, which overflows at 65504.

How it is told
By headers alone, one finding for each pair of dtypes. The tensors are compared in the dtype of MERGED.

Evidence
base, merged: the two dtypes.

What to do
If it was not meant, load the base with torch_dtype set to its own dtype and save again.

Seen in
axolotl-ai-cloud/axolotl#902, hiyouga/LlamaFactory#2075, hiyouga/LlamaFactory#7998, OpenBMB/MiniCPM-V#502
"""

from __future__ import annotations

from lora_check.faults._findings import found, many
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding for each pair of dtypes."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for one in plan.retyped:
        pairs.setdefault((one.expected, one.actual), []).append(one.name)
    return tuple(
        found(
            FAULT,
            f"{many(len(names), 'tensor')} stored as {actual}, {expected} in BASE",
            names,
            base=expected,
            merged=actual,
        )
        for (expected, actual), names in pairs.items()
    )


FAULT = PlanFault(
    code="LC204",
    name="dtype-changed",
    severity="info",
    summary="tensors stored in another dtype than BASE",
    help="load the base with torch_dtype set to its own dtype if the change was not meant",
    detect=detect,
    verdict=Verdict.VERIFIED,
)

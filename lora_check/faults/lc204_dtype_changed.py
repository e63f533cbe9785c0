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
base, merged: the two dtypes. base_bytes, merged_bytes: what these tensors take in BASE and in MERGED.

What to do
If it was not meant, load the base with torch_dtype set to its own dtype and save again.

Seen in
axolotl-ai-cloud/axolotl#902, hiyouga/LlamaFactory#2075, hiyouga/LlamaFactory#7998, hiyouga/LlamaFactory#3137,
modelscope/ms-swift#841, OpenBMB/MiniCPM-V#502
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, many
from lora_check.faults._sizes import spoken, total
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding for each pair of dtypes."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for one in plan.retyped:
        pairs.setdefault((one.expected, one.actual), []).append(one.name)
    return tuple(_of_pair(plan, expected, actual, names) for (expected, actual), names in pairs.items())


def _of_pair(plan: Plan, expected: str, actual: str, names: Sequence[str]) -> Finding:
    wanted = set(names)
    couples = [(one.base, one.merged) for one in plan.pairings if one.base and one.merged.name in wanted]
    before, after = total(base for base, _ in couples), total(merged for _, merged in couples)
    message = f"{many(len(names), 'tensor')} stored as {actual}, {expected} in BASE"
    grown = f": {spoken(after)} in place of {spoken(before)}" if before != after else ""
    sizes = {"base_bytes": before, "merged_bytes": after}
    return found(FAULT, message + grown, names, base=expected, merged=actual, **sizes)


FAULT = PlanFault(
    code="LC204",
    name="dtype-changed",
    severity="info",
    summary="tensors stored in another dtype than BASE",
    help="load the base with torch_dtype set to its own dtype if the change was not meant",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M45",),
)

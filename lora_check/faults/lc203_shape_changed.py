"""LC203 shape-changed

What it is
A tensor of MERGED has another shape than base and adapter give it.

How it happens
The vocabulary was resized in one of base, adapter and merged, and not in the others, or padded to a
multiple of 64.
The model was saved packed in 4 bits, or with experts or projections fused.
Only one rank's slice of a tensor was saved.

How it is told
By headers alone. Nothing of such a tensor is compared.

Evidence
shapes: for each pair of shapes, expected and found, how many tensors have it.

What to do
Resize the base as it was when the adapter was trained, merge, and save unquantised.

Seen in
hiyouga/LlamaFactory#3125, allenai/open-instruct#142, unslothai/unsloth#1215, huggingface/peft#1689
"""

from __future__ import annotations

from collections import Counter

from lora_check.faults._findings import found, many
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every such tensor."""
    if not plan.reshaped:
        return ()
    first, count = plan.reshaped[0], len(plan.reshaped)
    example = f"{first.name} is {first.actual}, not {first.expected}"
    message = f"{many(count, 'tensor')} of another shape: {example}"
    shapes = Counter(f"{one.expected} -> {one.actual}" for one in plan.reshaped)
    return (found(FAULT, message, (one.name for one in plan.reshaped), shapes=dict(shapes)),)


FAULT = PlanFault(
    code="LC203",
    name="shape-changed",
    severity="error",
    summary="tensors of another shape",
    help="resize the base as it was when the adapter was trained, and merge again",
    detect=detect,
    verdict=Verdict.REFUTED,
)

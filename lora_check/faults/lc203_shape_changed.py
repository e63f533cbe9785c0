"""LC203 shape-changed

What it is
A tensor of MERGED has another shape than base and adapter give it.

How it happens
The vocabulary was resized in one of base, adapter and merged, and not in the others, or padded to a
multiple of 64.
The model was saved packed in 4 bits, or with experts or projections fused.
Only one rank's slice of a tensor was saved.

How it is told
By headers alone. Where nothing but the number of rows differs, the rows that both have are compared all the same, and
LC220 tells what lies beyond; of others nothing is compared.

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
from lora_check.types import Finding, Mismatch, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every such tensor."""
    reshaped = [*plan.reshaped, *_cut(plan)]
    if not reshaped:
        return ()
    first, count = reshaped[0], len(reshaped)
    example = f"{first.name} is {first.actual}, not {first.expected}"
    message = f"{many(count, 'tensor')} of another shape: {example}"
    shapes = Counter(f"{one.expected} -> {one.actual}" for one in reshaped)
    return (found(FAULT, message, (one.name for one in reshaped), shapes=dict(shapes)),)


def _cut(plan: Plan) -> list[Mismatch]:
    """The tensors of which some rows are compared all the same."""
    return [
        Mismatch(name=one.merged.name, expected=str(one.wanted), actual=str(one.merged.shape))
        for one in plan.pairings
        if one.wanted
    ]


FAULT = PlanFault(
    code="LC203",
    name="shape-changed",
    severity="error",
    summary="tensors of another shape",
    help="resize the base as it was when the adapter was trained, and merge again",
    detect=detect,
    verdict=Verdict.REFUTED,
    causes=("M29",),
)

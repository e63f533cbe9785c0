"""LC130 not-finite

What it is
The merged tensor holds NaN or infinity.

How it happens
The sum of base and delta is beyond the largest number of the dtype, 65504 in fp16; or a bf16 model was cast to fp16,
on the way or in the end. An adapter that overflows when it is merged may work unmerged.
The adapter itself holds NaN, commonly from a training run that diverged.
The merge ran on memory that was never filled, such as an offloaded or a meta tensor.

How it is told
By counting, before every other mistake. Each such number is held against BASE, the exact sum, and the largest numbers
of the dtype and of fp16: the first that accounts for it is told.

Evidence
elements: how many elements of the worst tensor are NaN or infinity. sources: where they come from, counted.

What to do
Merge with safe_merge=True, which refuses to write them, and in bf16 or fp32 if fp16 overflowed.

Seen in
huggingface/peft#1001, huggingface/diffusers#5316, openvla/openvla#53, huggingface/peft#3611
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_check.faults._cases import never
from lora_check.types import ValueFault


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """The sources of all tensors together, the most frequent first."""
    counts: Counter[str] = Counter()
    for one in told:
        counts.update(one.get("sources", {}))
    phrases = [phrase for phrase, _ in counts.most_common()]
    return f"NaN or infinity: {', '.join(phrases)}," if phrases else str(FAULT.summary)


FAULT = ValueFault(
    code="LC130",
    name="not-finite",
    severity="error",
    summary="NaN or infinity",
    help="merge again with safe_merge=True, which refuses to write such numbers",
    inject=never,
    tell=tell,
    kinds=("target", "copy", "bystander"),
    causes=("M45", "M53"),
)

"""LC130 not-finite

What it is
The merged tensor holds NaN or infinity.

How it happens
The sum of base and delta is beyond the largest number of the dtype: 65504 in fp16.
The adapter itself holds NaN, commonly from a training run that diverged.
The merge ran on memory that was never filled, such as an offloaded or a meta tensor.

How it is told
By counting. It comes before every other mistake: numbers that are none have no further cause to be told.

Evidence
elements: how many elements of the worst tensor are NaN or infinity.

What to do
Merge with safe_merge=True, which refuses to write them, and in bf16 or fp32 if fp16 overflowed.

Seen in
huggingface/peft#1001, huggingface/diffusers#5316, openvla/openvla#53, huggingface/peft#3611
"""

from __future__ import annotations

from lora_check.faults._cases import never
from lora_check.types import ValueFault

FAULT = ValueFault(
    code="LC130",
    name="not-finite",
    severity="error",
    summary="NaN or infinity",
    help="merge again with safe_merge=True, which refuses to write such numbers",
    inject=never,
    kinds=("target", "copy", "bystander"),
)

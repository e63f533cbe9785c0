"""LC169 factors-underflowed

What it is
The adapter is stored in fp16, and most numbers of its B are too small for it: they became 0, or subnormals of a few
bits.

How it happens
Small factors, such as those of short runs with a low learning rate or a large alpha, were saved in half precision
(kohya scripts, a .half() before save_pretrained). The smallest fp16 number is 6e-8, full precision ends at 6e-5;
alpha was brought into LoRA scripts for this.

How it is told
The B of all modules together are counted: more than half of their numbers are 0 or subnormal, and some are subnormal,
so that they are no untrained zeros. MERGED may hold this adapter rightly: what was lost before is in no file.

Evidence
adapter: where it lies. numbers, zeros, subnormals: of its B.

What to do
Save the adapter again in fp32 or bf16 from the training state.

Seen in
kohya-ss/sd-webui-additional-networks#49, huggingface/peft#1017
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found
from lora_check.types import Adapter, Comparison, Finding, PatternFault, Plan

ROLES = ("B", "embedding_B")


def detect(plan: Plan, comparisons: Sequence[Comparison]) -> tuple[Finding, ...]:
    """One finding for each adapter whose B are mostly lost."""
    from lora_check.rounding import MOST

    counted = [(adapter, *counts(adapter)) for adapter in plan.adapters]
    return tuple(
        found(
            FAULT,
            f"{zeros + subnormals} of {numbers} numbers of B are 0 or subnormal in fp16: the adapter was blurred when"
            " it was saved",
            adapter=adapter.location,
            numbers=numbers,
            zeros=zeros,
            subnormals=subnormals,
        )
        for adapter, numbers, zeros, subnormals in counted
        if subnormals and zeros + subnormals > MOST * numbers
    )


def counts(adapter: Adapter) -> tuple[int, int, int]:
    """How many numbers the B in fp16 have, how many are zero, and how many subnormal."""
    from lora_check.rounding import FORMATS

    numbers = zeros = subnormals = 0
    metas = adapter.checkpoint.metas()
    for part in adapter.parts:
        if part.role in ROLES and part.tensor in metas and metas[part.tensor].dtype == "float16":
            sizes = adapter.checkpoint.read(part.tensor).abs()
            zero = int((sizes == 0).sum())
            numbers, zeros = numbers + sizes.numel(), zeros + zero
            subnormals += int((sizes < 2.0 ** FORMATS["float16"].least_exponent).sum()) - zero
    return numbers, zeros, subnormals


FAULT = PatternFault(
    code="LC169",
    name="factors-underflowed",
    severity="warning",
    summary="most of the adapter's numbers too small for fp16",
    help="save the adapter again in fp32 or bf16 from the training state",
    detect=detect,
    causes=("M57",),
)

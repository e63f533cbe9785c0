"""LC170 zero-filled-tensor

What it is
A tensor of MERGED is zero throughout, and what belongs there is not.

How it happens
The tensor was on a meta device or offloaded when the model was saved, and its memory was never filled.
A shard of a model under FSDP or ZeRO-3 was not gathered: the other ranks' part was written as zeros.
A converter made the tensor with torch.zeros and found nothing to copy into it.

How it is told
W' = 0 reproduces every element, in a target, a saved tensor or a bystander, and BASE is not zero there. A base that
is zero and was not merged is told as LC101.

Evidence
over_budget: elements of the worst tensor that should not be zero.

What to do
Merge again with the whole model in memory, without device_map="auto", and gather it before saving.

Seen in
hiyouga/LlamaFactory#3238, hiyouga/LlamaFactory#3096, axolotl-ai-cloud/axolotl#3294
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._whole import holds_numbers, stands_in
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """W' = 0, where neither a base of zeros nor an adapter would write that."""
    if not (holds_numbers(case.base) or stands_in(case.base)):
        return ()
    return (replace(case, base=case.base.new_zeros((1, 1)).expand(case.base.shape), steps=()),)


FAULT = ValueFault(
    code="LC170",
    name="zero-filled-tensor",
    severity="error",
    summary="filled with zeros",
    help="merge again with the whole model in memory, and gather it before saving",
    inject=inject,
    kinds=("target", "copy", "bystander"),
    causes=("M51",),
)

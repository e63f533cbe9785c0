"""LC166 start-left-in-the-base

What it is
The adapter belongs to a base without its largest part, and was merged into BASE as it is: that part is in there twice.

How it happens
PiSSA and OLoRA begin with B A as a part of W and train beside the rest, W - s B0 A0; KaSA trains beside W without
its smallest part. PEFT takes the start off again whenever it loads such an adapter. Export scripts and converters
that only read A and B do not.

How it is told
W' = W + s B A over BASE as it lies, without the step that its init_lora_weights or kasa_config asks for, reproduces
every element. The same bits are right where BASE is the residual model that the training saved: look whether it is
the model that the adapter's authors started from.

Evidence
left_in: the formulas of the steps that were left out.

What to do
Merge with PEFT, or convert the adapter first with path_initial_model_for_weight_conversion.

Seen in
huggingface/peft#2184, huggingface/peft#2186, huggingface/peft#2270, huggingface/peft#1626,
huggingface/transformers#34468, ISEEKYAN/Megatron-LM#75
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import deltas
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """The case without what is done to the base while the adapter is loaded."""
    loads = [step for step in case.steps if step.recipe.loads]
    if not loads or not deltas(case):
        return ()
    kept = tuple(step for step in case.steps if not step.recipe.loads)
    return (replace(case, steps=kept, told={"left_in": sorted({step.recipe.formula for step in loads})}),)


FAULT = ValueFault(
    code="LC166",
    name="start-left-in-the-base",
    severity="error",
    summary="merged into the whole base, the start of the training not taken off",
    help="merge with PEFT, or convert the adapter with path_initial_model_for_weight_conversion first",
    inject=inject,
    causes=("M19",),
)

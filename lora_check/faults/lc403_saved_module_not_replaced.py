"""LC403 saved-module-not-replaced

What it is
The adapter carries this tensor whole, trained, and MERGED still holds the base's.

How it happens
The exporter walks the LoRA pairs only and forgets modules_to_save: embeddings, the head, a score or
projector layer.
Biases trained with bias="all", or trained token rows, were left behind in the same way.

How it is told
W' = W reproduces the tensor bit for bit, where W' = S, the adapter's own tensor, is right.

Evidence
over_budget: elements that differ from the adapter's tensor.

What to do
Merge with a tool that reads modules_to_save; PEFT's merge_and_unload() does.

Seen in
unslothai/unsloth#3444, unslothai/unsloth#4098, huggingface/peft#322, haotian-liu/LLaVA#784,
huggingface/peft#3306
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import copies, deltas
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W, where a step would have copied."""
    if not any(step.factors for step in copies(case)):
        return ()
    return (replace(case, steps=deltas(case)),)


FAULT = ValueFault(
    code="LC403",
    name="saved-module-not-replaced",
    severity="error",
    summary="saved module not replaced",
    help="merge with a tool that reads modules_to_save, such as merge_and_unload()",
    inject=inject,
    kinds=("copy",),
)

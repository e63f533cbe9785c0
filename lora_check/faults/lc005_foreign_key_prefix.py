"""LC005 foreign-key-prefix

What it is
The adapter's keys are not written as PEFT writes them. They are understood here; most PEFT releases skip
them silently.

How it happens
The model was saved from inside torch.compile, DDP or FSDP, which puts _orig_mod., module. or
_fsdp_wrapped_module. in.
A trainer wrote the state dict itself, without base_model.model. or with the adapter's name left in the
keys.

How it is told
By the names alone. If the targets hold the base as well (LC101), this is very likely why.

Evidence
prefix: what is foreign in the keys. adapter: where the file lies.

What to do
Save the adapter again with save_pretrained of the unwrapped PeftModel, or rename its keys, before it is
merged anew.

Seen in
huggingface/peft#2699, huggingface/transformers#38627, vllm-project/vllm#34186, NVIDIA-NeMo/Automodel#3630
"""

from __future__ import annotations

from lora_check.faults._findings import found
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding for each adapter with such keys."""
    return tuple(
        found(
            FAULT,
            f"the adapter's keys are not PEFT's ({adapter.foreign_prefix}): PEFT would silently skip them",
            prefix=adapter.foreign_prefix,
            adapter=adapter.location,
        )
        for adapter in plan.adapters
        if adapter.foreign_prefix
    )


FAULT = PlanFault(
    code="LC005",
    name="foreign-key-prefix",
    severity="warning",
    summary="adapter keys that PEFT would silently skip",
    help="save the adapter again with save_pretrained of the unwrapped PeftModel",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M02",),
)

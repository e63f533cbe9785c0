"""LC207 unmerged-state-dict

What it is
MERGED is a PEFT model that was saved as it stood: base layers and factors side by side, nothing merged.

How it happens
save_pretrained() or state_dict() was called on the wrapped model.
merge_and_unload() was called and its return value thrown away; the call does not work in place.

How it is told
By names alone: base_layer, lora_A, lora_B, modules_to_save or base_model.model. in the names of MERGED. The
plain names that stand behind them are not told as missing (LC201), nor these as extra (LC202).

Evidence
wrapped: how many such names there are.

What to do
Write model = model.merge_and_unload(), and save that model. Where both factors and base layers are in this file,
nothing is lost: it can still be merged.

Seen in
verl-project/verl#4761, OpenGVLab/InternVL#548, vllm-project/vllm#1625, huggingface/peft#1381, unslothai/unsloth#611,
meta-pytorch/torchtune#935
"""

from __future__ import annotations

from lora_check.faults._findings import found, listed, many
from lora_check.faults._wrapped import wrapped
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every name of a wrapper."""
    names = wrapped(plan)
    if not names:
        return ()
    message = f"MERGED is an unmerged PEFT model, by {many(len(names), 'name')}: {listed(names, limit=2)}"
    return (found(FAULT, message, names, wrapped=len(names)),)


FAULT = PlanFault(
    code="LC207",
    name="unmerged-state-dict",
    severity="error",
    summary="an unmerged PEFT model",
    help="save the model that merge_and_unload() returns, not the one it was called on",
    detect=detect,
    verdict=Verdict.REFUTED,
    causes=("M36",),
)

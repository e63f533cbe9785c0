"""LC003 empty-adapter

What it is
The adapter file holds no factors: there is nothing that a merge could have added, and nothing to check
against.

How it happens
The saver filtered every LoRA tensor away, which leaves a file of a few hundred bytes: a patched state_dict() of old
training scripts did so. ZeRO-3 shards were saved without being gathered, which leaves tensors of size 0.
The folder given as ADAPTER is not the adapter.

How it is told
No tensor of the file is a factor or a saved module, or all of them have no elements.

Evidence
adapter: where the file lies. held: how many tensors it has, of whatever kind.

What to do
Save the adapter again with save_pretrained, gathered when it was trained under ZeRO-3, and give that
folder.

Seen in
tloen/alpaca-lora#446, tloen/alpaca-lora#334, huggingface/peft#2450, huggingface/accelerate#3508, aim-uofa/LoRAPrune#4
"""

from __future__ import annotations

from lora_check.faults._empty import is_empty
from lora_check.faults._findings import found
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding for each adapter without a single number."""
    return tuple(
        found(
            FAULT,
            "the adapter file holds no factors",
            adapter=adapter.location,
            held=len(adapter.checkpoint.metas()),
        )
        for adapter in plan.adapters
        if is_empty(adapter)
    )


FAULT = PlanFault(
    code="LC003",
    name="empty-adapter",
    severity="error",
    summary="the adapter file holds no factors",
    help="save the adapter again with save_pretrained and give that folder",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M08",),
)

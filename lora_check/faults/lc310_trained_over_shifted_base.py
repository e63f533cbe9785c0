"""LC310 trained-over-shifted-base

What it is
The merge is what PEFT makes of the files, and not the model that was trained: the adapter learnt beside a base that had
been shifted, and neither file holds the shift.

How it happens
LoRA-GA takes s B0 A0, its starting point, out of the base when training begins. save_pretrained keeps B and A, and puts
the shift into them only where path_initial_model_for_weight_conversion is given. On loading there is no gradient to
start from, so PEFT adds s B A to the base as it lies: merged and unmerged alike.

How it is told
By the configuration: init_lora_weights is "lora_ga". A converted adapter says true.

Evidence
adapter: where the adapter lies. start: its init_lora_weights.

What to do
Save the adapter again from the training state with path_initial_model_for_weight_conversion, and merge that one.

Seen in
No public report known.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.faults._findings import found, many
from lora_check.types import Adapter, Finding, Plan, PlanFault

SHIFTING = "lora_ga"
"""The start that PEFT does not repeat on loading; PiSSA, OLoRA and KaSA it does repeat."""


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding for each such adapter, with its linear targets: of other layers LoRA-GA leaves the base alone."""
    shifted = [
        (adapter, [one.merged.name for one in plan.targets if index in one.adapters and "linear" in one.recipe])
        for index, adapter in enumerate(plan.adapters)
        if str(adapter.config.raw.get("init_lora_weights")).lower() == SHIFTING
    ]
    return tuple(_finding(adapter, targets) for adapter, targets in shifted if targets)


def _finding(adapter: Adapter, targets: Sequence[str]) -> Finding:
    message = f"{many(len(targets), 'target')} trained over a base that LoRA-GA had shifted, and the shift is lost"
    return found(FAULT, message, targets, adapter=adapter.location, start=adapter.config.raw["init_lora_weights"])


FAULT = PlanFault(
    code="LC310",
    name="trained-over-shifted-base",
    severity="warning",
    summary="adapters trained over another base than the one they are loaded on",
    help="save the adapter again with path_initial_model_for_weight_conversion, and merge that one",
    detect=detect,
    causes=("M19",),
)

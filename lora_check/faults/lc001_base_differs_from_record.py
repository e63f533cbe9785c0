"""LC001 base-differs-from-record

What it is
The adapter records the base it was trained on, and BASE calls itself something else.

How it happens
The instruct model was given in place of the plain one, or another size or stage of it.
A local copy was renamed, or is a fine-tune that kept its parent's name in its config.json: then this is no
mistake.

How it is told
The last part of base_model_name_or_path is compared, whatever the case of its letters, with the last part
of BASE's location, its hub cache folder and the _name_or_path of its config.json. One match clears it. A
local path in the record and the bare name of BASE's folder say nothing, so neither raises it.

Evidence
recorded: what the adapter says. base: what BASE calls itself.

What to do
Trust the tensors over the names: if they verify, this is the right base; if LC404 is there too, it is not.

Seen in
hiyouga/LlamaFactory#6105, hiyouga/LlamaFactory#1129, unslothai/unsloth#2150
"""

from __future__ import annotations

from lora_check.faults._findings import found
from lora_check.faults._names import claims, is_hub_name, last
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding for each adapter whose record contradicts a record of BASE."""
    claimed = claims(plan.base_config, plan.base_location)
    names = {last(name) for name in (*claimed, plan.base_location)}
    return tuple(
        found(
            FAULT,
            f"the adapter was trained on {recorded}, BASE calls itself {claimed[0]}",
            recorded=recorded,
            base=list(claimed),
        )
        for recorded in dict.fromkeys(adapter.config.base_name for adapter in plan.adapters)
        if claimed and is_hub_name(recorded) and last(recorded) not in names
    )


FAULT = PlanFault(
    code="LC001",
    name="base-differs-from-record",
    severity="info",
    summary="the adapter records another base",
    help="make sure that BASE is the model and the revision the adapter was trained on",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M04",),
)

"""LC006 target-without-factors

What it is
adapter_config.json names modules of BASE as targets for which the adapter file has no factors.

How it happens
Part of the adapter was lost on the way: some keys were filtered, some shards or ranks were not saved.
The configuration was widened after training, or some layers were left out with layers_to_transform.

How it is told
target_modules is matched with the modules of BASE as PEFT matches it, and the factors are taken off.
These modules are checked as bystanders: the base, bit for bit.

Evidence
targets: how many such modules there are.

What to do
Compare the adapter file with the one that training wrote. If it is whole, there is nothing to do.

Seen in
unslothai/unsloth-zoo#808, unslothai/unsloth#2978
"""

from __future__ import annotations

from lora_check.faults._findings import found, listed, many
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every such module."""
    if not plan.idle:
        return ()
    count = many(len(plan.idle), "target")
    message = f"{count} of the configuration without factors in the adapter: {listed(plan.idle, limit=2)}"
    return (found(FAULT, message, plan.idle, targets=len(plan.idle)),)


FAULT = PlanFault(
    code="LC006",
    name="target-without-factors",
    severity="warning",
    summary="targets of the configuration without factors",
    help="compare the adapter file with the one that training wrote",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M08",),
)

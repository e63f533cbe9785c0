"""LC201 missing-tensor

What it is
MERGED lacks tensors that base and adapter say it must have.

How it happens
The checkpoint was written with the wrong model class: a reward model as a causal one, a mixture as a dense
model.
A shard was not written or not uploaded, or the index names other files.
A trained head that the base lacks was left out, because the exporter walks the names of the base.

How it is told
By names alone, known renames taken into account. A tied head that is not stored twice, and buffers that the
model builds anew, are not missing. Names that an unmerged PEFT model merely dresses up belong to LC207, names that may
have become others to LC209.

Evidence
missing: how many there are. brought: those that only the adapter has; a loader that finds none draws random numbers.

What to do
Save the merged model again with the class that the base's config.json names.

Seen in
huggingface/trl#368, axolotl-ai-cloud/axolotl#1267, unslothai/unsloth-zoo#1087, unslothai/unsloth#3444
"""

from __future__ import annotations

from lora_check.faults._classes import lost
from lora_check.faults._findings import found, listed, many
from lora_check.faults._unpaired import unpaired
from lora_check.faults._wrapped import unwrapped
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every missing name that neither LC207 nor LC209 nor LC211 explains."""
    told = {*unwrapped(plan), *unpaired(plan), *(set(lost(plan)) - _brought(plan))}
    missing = [name for name in plan.missing if name not in told]
    if not missing:
        return ()
    brought = sorted(_brought(plan) & set(missing))
    whose = f"; the adapter brings {listed(brought, limit=2)}, which a loader will make anew" if brought else ""
    message = f"{many(len(missing), 'tensor')} missing from MERGED: {listed(missing, limit=2)}{whose}"
    return (found(FAULT, message, missing, missing=len(missing), **({"brought": brought} if brought else {})),)


def _brought(plan: Plan) -> set[str]:
    """The tensors that an adapter carries whole and BASE does not have."""
    whole = {part.module for adapter in plan.adapters for part in adapter.parts if part.role == "S"}
    return whole - plan.base_metas.keys()


FAULT = PlanFault(
    code="LC201",
    name="missing-tensor",
    severity="error",
    summary="tensors missing from MERGED",
    help="save the merged model again with the class that the base's config.json names",
    detect=detect,
    verdict=Verdict.REFUTED,
    causes=("M03", "M06", "M16", "M27"),
)

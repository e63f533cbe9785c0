"""LC211 written-as-another-class

What it is
MERGED's config.json names another model class than BASE's, and tensors are missing or new: the model was loaded as one
class and saved as it, and what that class has no place for is gone.

How it happens
A reward model or a classifier was merged through the causal-LM class, and lost its score head; a mixture of experts
was loaded as the dense model it is built on: 87 GB in, 14 GB out. transformers warns of weights not used and newly
initialised, and goes on.

How it is told
By the architectures and model_type of both files, told only where tensors are missing or new and no other name for
them is likely. The new ones are not told as extra (LC202).

Evidence
base, merged: the classes. base_bytes, merged_bytes: what their tensors take.

What to do
Load the base with the class that its config.json names, merge, and save again.

Seen in
huggingface/trl#368, huggingface/trl#398, axolotl-ai-cloud/axolotl#1267, unslothai/unsloth-zoo#1087
"""

from __future__ import annotations

from lora_check.faults._classes import class_of, gained, lost
from lora_check.faults._findings import found, many
from lora_check.faults._sizes import spoken, total
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding where class and tensors have both changed."""
    missing, extra = lost(plan), gained(plan)
    if not missing and not extra:
        return ()
    base, merged = class_of(plan.base_config), class_of(plan.merged_config)
    before, after = (total(metas.values()) for metas in (plan.base_metas, plan.merged_metas))
    message = (
        f"MERGED is a {merged}, BASE a {base}: {many(len(missing), 'tensor')} lost, {len(extra)} new, "
        f"{spoken(before)} in, {spoken(after)} out"
    )
    return (found(FAULT, message, [*missing, *extra], base=base, merged=merged, base_bytes=before, merged_bytes=after),)


FAULT = PlanFault(
    code="LC211",
    name="written-as-another-class",
    severity="error",
    summary="another model class than BASE's",
    help="load the base with the class that its config.json names, merge, and save again",
    detect=detect,
    verdict=Verdict.REFUTED,
    causes=("M16",),
)

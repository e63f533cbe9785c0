"""LC213 names-changed

What it is
MERGED calls its tensors otherwise than BASE, or fuses and splits them otherwise. They were paired all the same, and
checked; a program that loads MERGED by BASE's names may not find them.

How it happens
Releases of transformers rename what they save: the prefixes of vision-language models in 4.52, experts stacked in 5.
An exporter writes the names that another program reads, or a base model's prefix was added or lost.

How it is told
By the names that the known layouts pair.

Evidence
renamed: how many tensors. example: one of them, old and new name.

What to do
Nothing, if what serves MERGED loads it; else save it with the release that wrote BASE.

Seen in
vllm-project/vllm#15031, vllm-project/vllm#19139, unslothai/unsloth-zoo#158, zai-org/GLM-V#61
"""

from __future__ import annotations

from lora_check.faults._findings import found, many
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every renamed tensor; between GGUF and other files all names differ, and nobody wonders."""
    if not plan.renamed or ("gguf" in plan.base_config) != ("gguf" in plan.merged_config):
        return ()
    new, old = next(iter(plan.renamed.items()))
    message = f"{many(len(plan.renamed), 'tensor')} under other names than in BASE: {old} is {new}"
    return (found(FAULT, message, plan.renamed, renamed=len(plan.renamed), example={old: new}),)


FAULT = PlanFault(
    code="LC213",
    name="names-changed",
    severity="info",
    summary="tensors under other names than in BASE",
    help="save MERGED with the release that wrote BASE if what serves it does not load it",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M37",),
)

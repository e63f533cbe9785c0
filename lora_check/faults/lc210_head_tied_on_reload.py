"""LC210 head-tied-on-reload

What it is
MERGED has an output head of its own, and its configuration says that the head is the input embedding: whoever loads it
gets one tensor for both, and the trained head, or the embedding, is lost.

How it happens
modules_to_save trained the head of a model that ties it, and PEFT up to 0.18 saved the merged model with
tie_word_embeddings still true. Reloaded, the embedding is wrong (PEFT 0.6 to 0.11) or the head is (0.12 to 0.18).
The configuration was copied from BASE beside the weights of an exporter.

How it is told
The adapter carries the head whole, or BASE keeps it apart, and MERGED's config.json says tie_word_embeddings.

Evidence
head: the tensor that a reload would lose or spread.

What to do
Set tie_word_embeddings to false in MERGED's config.json, with both tensors in the file; PEFT 0.19 and later do so.

Seen in
huggingface/peft#3126, huggingface/peft#2018
"""

from __future__ import annotations

from lora_check.faults._findings import found, listed
from lora_check.types import Finding, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every head that has numbers of its own under a configuration that ties it."""
    if not plan.merged_config.get("tie_word_embeddings"):
        return ()
    if not plan.untied:
        return ()
    message = f"{listed(plan.untied)} has its own numbers, and MERGED's config.json ties it to the embedding"
    return (found(FAULT, message, plan.untied, head=plan.untied[0]),)


FAULT = PlanFault(
    code="LC210",
    name="head-tied-on-reload",
    severity="error",
    summary="a head of its own that a reload ties to the embedding",
    help="set tie_word_embeddings to false in MERGED's config.json and keep both tensors in the file",
    detect=detect,
    verdict=Verdict.REFUTED,
    causes=("M06",),
)

"""LC223 delta-in-both-of-a-tie

What it is
The adapter trained the output head or the input embedding, and MERGED has one tensor for both: what was trained for the
one is read by the other too.

How it happens
The model ties its head to its embedding, as most small ones do. Unmerged, PEFT applies the delta in the module that it
was trained for; merge_and_unload() adds it to the tensor that both share, and warns of it.

How it is told
The tied tensor has the delta of one of the two modules and not of the other, and ensure_weight_tying is not set. The
tensor is what such a merge writes, so this alone refutes nothing.

Evidence
trained: the module that was trained.

What to do
Write head and embedding as two tensors with tie_word_embeddings false, the delta in the one; both ways are verified.

Seen in
huggingface/peft#2018, huggingface/peft#2864, hiyouga/LlamaFactory#6749, thinking-machines-lab/tinker-cookbook#593
"""

from __future__ import annotations

from lora_check.faults._findings import found
from lora_check.types import Finding, Pairing, Plan, PlanFault

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding for each tied tensor with a delta of one of its two modules alone."""
    if not plan.merged_config.get("tie_word_embeddings"):
        return ()
    told = ((one.merged.name, _trained(one)) for one in plan.pairings if _is_alone(one, plan))
    return tuple(
        found(
            FAULT,
            f"{name} is head and embedding, and its delta was trained for {module} alone",
            (name,),
            trained=module,
        )
        for name, module in told
        if module
    )


def _is_alone(pairing: Pairing, plan: Plan) -> bool:
    """Whether this is an input embedding, and no other tensor of MERGED can be a head."""
    named = pairing.merged.name.removesuffix(".weight").rsplit(".", 1)[-1] in EMBEDDINGS
    return named and not any(one.merged.shape == pairing.merged.shape for one in plan.pairings if one is not pairing)


def _trained(pairing: Pairing) -> str:
    """The one module that a tensor has a delta of; nothing where it is several, or an adapter ties them itself."""
    sites = [step.site for step in pairing.steps if step.site and not step.recipe.copies]
    modules = {site.parameter.rpartition(".")[0] for site in sites}
    tied = any(site.settings.get("ensure_weight_tying") for site in sites)
    return modules.pop() if len(modules) == 1 and not tied else ""


FAULT = PlanFault(
    code="LC223",
    name="delta-in-both-of-a-tie",
    severity="info",
    summary="one tensor for head and embedding, with a delta trained for one of them",
    help="write head and embedding as two tensors with tie_word_embeddings false, the delta in the one",
    detect=detect,
    causes=("M06",),
)

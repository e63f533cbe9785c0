"""LC301 no-recipe

What it is
Some tensors cannot be recomputed here, so they are neither verified nor refuted.

How it happens
The adapter is of a type, or uses a feature, whose merge is not modelled: its update depends on tokens or on
routing, or the base is changed when it is loaded (PiSSA, OLoRA, LoftQ and the like).
A module, several adapters on one weight or a configuration key is of a kind that this version does not
know.

How it is told
While planning, from the configuration and the shapes; one finding for each reason.

Evidence
count: how many tensors the reason concerns. adapter: where the adapter lies, if no tensor could be named.

What to do
Convert the adapter to a plain LoRA where its tool can do so, and check that one.

Seen in
huggingface/peft#2609, huggingface/peft#2184, huggingface/peft#2270, huggingface/peft#2638
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_check.faults._empty import WITHOUT_ELEMENTS, is_empty
from lora_check.faults._findings import found, many
from lora_check.types import Finding, Pairing, Plan, PlanFault, Verdict


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding for each reason; what LC002, LC003 and LC303 tell is left to them."""
    reasons: dict[str, list[str]] = {}
    for pairing in plan.pairings:
        if pairing.undecidable and not _told_elsewhere(pairing, plan):
            reasons.setdefault(pairing.undecidable, []).append(pairing.merged.name)
    tensors = [
        found(FAULT, f"{many(len(names), 'tensor')} not decided: {reason}", names) for reason, names in reasons.items()
    ]
    return (*tensors, *_features(plan, set(reasons)))


def _features(plan: Plan, told: set[str]) -> Iterator[Finding]:
    for adapter in plan.adapters:
        for reason in adapter.config.unsupported:
            if reason not in told:
                yield found(FAULT, f"not decided: {reason}", adapter=adapter.location)


def _told_elsewhere(pairing: Pairing, plan: Plan) -> bool:
    from lora_check.rounding import FORMATS

    if any(meta.dtype not in FORMATS for meta in (pairing.merged, pairing.base) if meta):
        return True
    if pairing.undecidable.endswith(WITHOUT_ELEMENTS) and any(is_empty(adapter) for adapter in plan.adapters):
        return True
    return any(phrase.endswith(f": {pairing.undecidable}") for phrase in plan.contradictions)


FAULT = PlanFault(
    code="LC301",
    name="no-recipe",
    severity="info",
    summary="tensors that cannot be recomputed",
    help="convert the adapter to a plain LoRA where its tool can do so, and check that one",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M60",),
)

"""LC115 tied-delta-twice

What it is
An embedding and the head tied to it share one delta (ensure_weight_tying), and the merged tensor has it two times.

How it happens
PEFT 0.19 to 0.21 merge the embedding's adapter and the head's into the one tensor that both are; its unmerged forward
applies it once to each. PEFT 0.18 merges it once.

How it is told
W' = W + 2 s B A reproduces every element, and the configuration says ensure_weight_tying.

Evidence
over_budget: elements of the worst target that no honest merge can have written. survival: about 2.

What to do
Add W + s B A once to the shared tensor, or train without ensure_weight_tying.

Seen in
huggingface/peft#2879
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import deltas, rescaled, tied
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """The delta of a tied embedding twice: as an embedding's and as a head's, stored in between, or at once."""
    if not tied(case):
        return ()
    again = deltas(case)
    as_head = tuple(replace(step, recipe=replace(step.recipe, stored=False)) for step in again)
    return (
        replace(case, steps=case.steps + as_head),
        replace(case, steps=case.steps + again),
        *rescaled(case, lambda scale: replace(scale, weight=2 * scale.weight)),
    )


FAULT = ValueFault(
    code="LC115",
    name="tied-delta-twice",
    severity="error",
    summary="the delta of a tied embedding merged through both of its names (PEFT 0.19 to 0.21)",
    help="merge the delta once, or train without ensure_weight_tying",
    inject=inject,
    causes=("M06",),
)

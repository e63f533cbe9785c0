"""LC102 applied-twice

What it is
The delta is in the target two times.

How it happens
merge() was called, and then merge_and_unload() or an exporter merged again (PEFT 0.6 and 0.7 did not
notice).
A second export took the folder of the first one, already merged, for its base.
An engine was given merged weights and the adapter on top.

How it is told
W' = (W + s B A) + s B A, stored in between or not, reproduces every element. rsLoRA's scale at r = 4 and alpha not
divided at r = 2 can write the same numbers: what explains most targets is named, the rest told beside it.

Evidence
over_budget: elements of the worst target that no honest merge can have written. survival: about 2.

What to do
Start again from the untouched base, in an empty folder, and merge once.

Seen in
huggingface/peft#1355, unslothai/unsloth#3633, radixark/miles#1087, huggingface/diffusers#5003
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import deltas, rescaled, tied
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """W' = (W + s B A) + s B A, stored in between; or W + 2 s B A, stored once."""
    again = deltas(case)
    if not again or tied(case):
        return ()
    at_once = rescaled(case, lambda scale: replace(scale, weight=2 * scale.weight))
    return (replace(case, steps=case.steps + again), *(() if any(one.recipe.apply for one in again) else at_once))


FAULT = ValueFault(
    code="LC102",
    name="applied-twice",
    severity="error",
    summary="merged twice",
    help="start again from the untouched base, in an empty folder, and merge once",
    inject=inject,
    causes=("M12",),
)

"""LC167 start-taken-off-twice

What it is
A converted adapter, which takes its own start off the base, was merged into a base that had lost it already.

How it happens
PiSSA and OLoRA train beside W - s B0 A0. save_pretrained with path_initial_model_for_weight_conversion writes the
plain LoRA [B, -B0] [A; A0] for W itself. It was merged into the model of the training session, or into the residual
model that was saved for the unconverted adapter.

How it is told
The second half of the ranks was added twice: W' = W + s B' A' - s B0 A0 reproduces every element. It is tried
where the columns of that half of B stand at right angles, as a start of these methods has them.

Evidence
over_budget: elements of the worst target that no honest merge can have written. ranks: of the start.

What to do
Merge the converted adapter into the untouched base.

Seen in
huggingface/peft#2184, huggingface/peft#2186, huggingface/peft#2270
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._start import halves
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + s B' A' - s B0 A0, B' = [B, -B0] and A' = [A; A0]."""
    if (found := halves(case)) is None:
        return ()
    _, start = found
    told = {"ranks": len(start.factors["A"])}
    return (replace(case, steps=(start, *case.steps), told=told),)


FAULT = ValueFault(
    code="LC167",
    name="start-taken-off-twice",
    severity="error",
    summary="converted adapter merged into a base that had lost its start already",
    help="merge the converted adapter into the untouched base",
    inject=inject,
    causes=("M19",),
)

"""LC166 start-left-in-the-base

What it is
The adapter belongs to a base without its largest part, and was merged into BASE as it is: that part is in there twice.

How it happens
PiSSA and OLoRA begin with B A as a part of W and train beside the rest, W - s B0 A0; KaSA trains beside W without
its smallest part. PEFT takes the start off again whenever it loads such an adapter. Export scripts and converters
that only read A and B do not.

How it is told
W' = W + s B A over BASE as it lies, without the step that its init_lora_weights or kasa_config asks for, reproduces
every element; of a converted adapter, which holds the start as the second half of its ranks, W + s B A with the first
half alone (where BASE has lost it: LC168). The same bits are right where BASE is the residual model that the training
saved. Then BASE has less in the columns of B than columns that have nothing to do with it have once in 2^40 times, and
that is told: the configuration asks for a step too many.

Evidence
left_in: the formulas of the steps that were left out. lost: BASE has lost the start already.

What to do
Merge with PEFT, or convert the adapter first with path_initial_model_for_weight_conversion.

Seen in
huggingface/peft#2184, huggingface/peft#2186, huggingface/peft#2270, huggingface/peft#1626,
huggingface/transformers#34468, ISEEKYAN/Megatron-LM#75
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.faults._cases import deltas
from lora_check.faults._start import halves, has_lost
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """The case without what is done to the base while the adapter is loaded."""
    if found := halves(case):
        trained, start = found
        whole = not has_lost(case, start)
        return (replace(case, steps=(trained,), told={"left_in": ["the converted half"]}),) if whole else ()
    loads = [step for step in case.steps if step.recipe.loads]
    if not loads or not (added := deltas(case)):
        return ()
    kept = tuple(step for step in case.steps if not step.recipe.loads)
    told = {"left_in": sorted({step.recipe.formula for step in loads})}
    lost = {"lost": True} if has_lost(case, added[-1]) else {}
    return (replace(case, steps=kept, told=told | lost),)


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """'merged into the whole base', or into one that has lost the start already, where most of the targets say so."""
    lost = sum(one.get("lost", False) for one in told)
    return "merged into BASE as it lies, which has lost the start already," if 2 * lost > len(told) else FAULT.summary


FAULT = ValueFault(
    code="LC166",
    name="start-left-in-the-base",
    severity="error",
    summary="merged into the whole base, the start of the training not taken off",
    help="merge with PEFT, or convert the adapter with path_initial_model_for_weight_conversion first; "
    "if BASE has lost the start, set init_lora_weights to true",
    inject=inject,
    tell=tell,
    causes=("M19",),
)

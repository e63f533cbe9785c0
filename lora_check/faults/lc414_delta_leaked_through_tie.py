"""LC414 delta-leaked-through-tie

What it is
The delta of the output head was added to the input embedding too, or the embedding's to the head: MERGED has both, and
only one of them was trained.

How it happens
In memory the two are one tensor. PEFT merges an adapter of lm_head into it, so the embedding moves along, and the
export writes both names.
A script looks for the tensor of a module by its storage or by its shape.

How it is told
W' = W + s B A with the factors of the tied tensor reproduces every element.

Evidence
from: the tensor whose delta it is.

What to do
Untie the two before the merge (tie_word_embeddings false, the head a copy), and merge again.

Seen in
huggingface/peft#2018, huggingface/peft#2864, hiyouga/LlamaFactory#6749
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.faults._cases import deltas
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + s B A of the tensor that is tied to this one."""
    if case.tied is None or case.grid is not None:
        return ()
    ours = {step.site.parameter for step in case.steps if step.site}
    theirs = deltas(replace(case, steps=case.tied.steps()))
    foreign = tuple(step for step in theirs if step.site and step.site.parameter not in ours)
    if not foreign:
        return ()
    return (replace(case, steps=case.steps + foreign, told={"from": case.tied.tensor}),)


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Whose delta it is."""
    names = {one["from"] for one in told}
    return f"the delta of {names.pop()} added here too" if len(names) == 1 else str(FAULT.summary)


FAULT = ValueFault(
    code="LC414",
    name="delta-leaked-through-tie",
    severity="error",
    summary="the delta of the tied tensor added here too",
    help="untie embedding and head before the merge, and merge again",
    inject=inject,
    tell=tell,
    kinds=("target", "copy", "bystander"),
    causes=("M06",),
)

"""LC410 trained-tensor-added

What it is
What the adapter carries whole, a bias, a saved module or trained token rows, was added to BASE; it belongs in its
place.

How it happens
PEFT calls the rows that trainable_token_indices trained `trainable_tokens_delta`; they are the new rows themselves,
and a script takes them for a difference.
A script adds everything in the adapter to the base: biases trained with bias="all" or "lora_only" are there as they
came out of the training.

How it is told
W' = W + S reproduces the tensor, or W'[i] = W[i] + S[j] the trained rows, where W' = S and W'[i] = S[j] are right.

Evidence
over_budget: elements that differ from the right tensor. rows: the trained rows, where it is rows.

What to do
Put the adapter's tensors and rows in the place of the base's; merge_and_unload() does so.

Seen in
huggingface/peft#3650, huggingface/peft#3656, vllm-project/vllm#55796
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.faults._whole import holds_numbers, spans, trained, with_copies
from lora_check.types import Case, Factors, LoadedStep, Numbers, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + S."""
    steps = trained(case)
    if not steps or not holds_numbers(case.base):
        return ()
    rows = {token for step in steps for token in step.tokens}
    told = {"rows": spans(sorted(rows))} if rows else {}
    return (replace(with_copies(case, _adding), told=told),)


def _adding(step: LoadedStep) -> LoadedStep:
    """The step with its recipe's result added, over a base of zeros, to the base itself."""
    put = step.recipe.replace
    assert put is not None, step.recipe.name

    def added(w: Numbers, factors: Factors, rows: slice, tokens: tuple[int, ...]) -> Numbers:
        return w + put(w * 0.0, factors, rows, tokens)

    return replace(step, recipe=replace(step.recipe, replace=added))


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Whether it was rows."""
    if all("rows" in one for one in told):
        rows = {one["rows"] for one in told}
        which = f" ({rows.pop()})" if len(rows) == 1 else ""
        return f"trained token rows{which} added to those of BASE, not put in their place"
    return str(FAULT.summary)


FAULT = ValueFault(
    code="LC410",
    name="trained-tensor-added",
    severity="error",
    summary="trained tensor added to that of BASE, not put in its place",
    help="put the adapter's tensors and rows in the place of the base's, as merge_and_unload() does",
    inject=inject,
    tell=tell,
    kinds=("copy",),
    causes=("M47", "M48"),
)

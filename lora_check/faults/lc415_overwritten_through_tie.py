"""LC415 overwritten-through-tie

What it is
Head and embedding of MERGED are one and the same tensor, and base and adapter keep them apart: one of them is lost.

How it happens
modules_to_save copies each module that it trains, so a tied pair drifts apart; the save or the next load ties them
again, and the one overwrites the other.
The merged model was reloaded with tie_word_embeddings true and saved once more.

How it is told
The tensor holds, bit for bit or as an honest merge may write it, what belongs into the other of the two.

Evidence
from: the tensor whose numbers it holds.

What to do
Set tie_word_embeddings to false in the configuration before the merged model is loaded or saved, and merge again.

Seen in
huggingface/transformers#45127, unslothai/unsloth#9331, unslothai/unsloth#1971, huggingface/peft#2803
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.types import Case, LoadedStep, ValueFault

SEEN = 8
"""Rows by which two base tensors are told apart; where these agree and no adapter comes in, no case is given."""


def inject(case: Case) -> tuple[Case, ...]:
    """W' = what the tensor that is tied to this one becomes."""
    if case.tied is None or case.tied.base is None or case.grid is not None:
        return ()
    base, steps = case.tied.base(), case.tied.steps()
    if base.shape != case.base.shape:
        return ()
    if _marks(steps) == _marks(case.steps) and not bool((base[:SEEN] != case.base[:SEEN]).any()):
        return ()
    return (replace(case, base=base, steps=steps, told={"from": case.tied.tensor}),)


def _marks(steps: Sequence[LoadedStep]) -> list[tuple[str, int, str]]:
    """What tells the steps of two tensors apart."""
    return [(step.recipe.name, step.adapter, step.site.parameter if step.site else "") for step in steps]


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Whose numbers it holds."""
    names = {one["from"] for one in told}
    return f"overwritten with {names.pop()}, to which it was tied" if len(names) == 1 else str(FAULT.summary)


FAULT = ValueFault(
    code="LC415",
    name="overwritten-through-tie",
    severity="error",
    summary="overwritten with the tensor to which it was tied",
    help="set tie_word_embeddings to false before the merged model is loaded or saved, and merge again",
    inject=inject,
    tell=tell,
    kinds=("target", "copy", "bystander"),
    causes=("M06",),
)

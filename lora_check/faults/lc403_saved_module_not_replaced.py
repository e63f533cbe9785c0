"""LC403 saved-module-not-replaced

What it is
The adapter carries this tensor whole, trained, and MERGED still holds the base's.

How it happens
The exporter walks the LoRA pairs only and forgets modules_to_save: embeddings, the head, a score or projector layer.
Biases trained with bias="all" or "lora_only", or token rows trained with trainable_token_indices, were left behind
in the same way; or the rows were put into the embedding and not into the head that is tied to it.

How it is told
W' = W reproduces the tensor bit for bit, where W' = S, the adapter's own tensor, is right; of an embedding that has a
delta too, W' = W + s B A, where W' = S + s B A is right.

Evidence
over_budget: elements that differ from the adapter's tensor. left: whether it is a module, biases or token rows.

What to do
Merge with a tool that reads modules_to_save; PEFT's merge_and_unload() does.

Seen in
unslothai/unsloth#3444, unslothai/unsloth#4098, huggingface/peft#322, haotian-liu/LLaVA#784,
huggingface/peft#3306
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.faults._cases import deltas
from lora_check.faults._whole import stands_in, trained
from lora_check.types import Case, ValueFault

WORDS = {
    "token rows": "trained token rows left as they are in BASE",
    "bias": "trained biases left as they are in BASE",
    "module": "saved module not replaced",
    "everything": "saved module not replaced, and its delta not added,",
}


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W, where a step would have copied; of a target W + s B A, or W too. What BASE lacks has no W."""
    steps = trained(case)
    if not steps or stands_in(case.base):
        return ()
    what = "token rows" if steps[-1].tokens else "bias" if case.name.endswith(".bias") else "module"
    added = deltas(case)
    left = (replace(case, steps=added, told={"left": what}),)
    return (*left, replace(case, steps=(), told={"left": "everything"})) if added else left


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """What was left, if it is all of one kind."""
    kinds = {one.get("left", "module") for one in told}
    return WORDS[kinds.pop() if len(kinds) == 1 else "module"]


FAULT = ValueFault(
    code="LC403",
    name="saved-module-not-replaced",
    severity="error",
    summary="saved module not replaced",
    help="merge with a tool that reads modules_to_save, such as merge_and_unload()",
    inject=inject,
    tell=tell,
    kinds=("target", "copy"),
    causes=("M03", "M06", "M47", "M48"),
)

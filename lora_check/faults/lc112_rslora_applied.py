"""LC112 rslora-applied

What it is
The adapter is plain LoRA, and was merged with rsLoRA's scale alpha / sqrt(r).

How it happens
A combined adapter took use_rslora over from its sources although their scales were already in its factors.
The merging tool has rsLoRA switched on for every adapter.

How it is told
W' = W + (alpha / sqrt(r)) B A reproduces every element, where alpha / r is right. At r = 4 this is the same
number as a merge done twice: modules of another rank tell them apart.

Evidence
scale, right: the scale that was used, and the right one. survival: about sqrt(r).

What to do
Merge again with use_rslora off, as adapter_config.json has it.

Seen in
huggingface/peft#3449, huggingface/peft#3473, huggingface/peft#3761
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import rescaled
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """s = alpha / sqrt(r)."""
    return rescaled(case, lambda scale: replace(scale, rule="alpha/sqrt(r)"))


FAULT = ValueFault(
    code="LC112",
    name="rslora-applied",
    severity="error",
    summary="rsLoRA scale used for a plain adapter",
    help="merge again with use_rslora off, as the adapter's configuration has it",
    inject=inject,
    causes=("M11", "M30"),
)

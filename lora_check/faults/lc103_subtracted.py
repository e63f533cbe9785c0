"""LC103 subtracted

What it is
The delta was taken off instead of added.

How it happens
An unmerge ran on a model that had not been merged.
The sign of alpha or of a weight was lost or doubled in a script.
PEFT 0.18 lost the sign of a negative weight when it combined adapters.

How it is told
W' = W - s B A reproduces every element. A command line with BASE and MERGED swapped writes almost the same numbers;
LC113 is tried beside it and explains what rounding this one cannot.

Evidence
scale, right: the scale that was used, and the right one. survival: about -1.

What to do
Merge again from the untouched base, once, without unmerging.

Seen in
huggingface/peft#2796, huggingface/peft#3004
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import rescaled
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W - s B A."""
    return rescaled(case, lambda scale: replace(scale, alpha=-scale.alpha))


FAULT = ValueFault(
    code="LC103",
    name="subtracted",
    severity="error",
    summary="delta subtracted",
    help="merge again from the untouched base, and unmerge only what was merged",
    inject=inject,
    causes=("M10", "M30"),
)

"""LC111 scale-one

What it is
B A was added as it is: the scale was left out, or taken for 1.

How it happens
A re-implementation of the merge writes W + B A, or has a scale of 1 written into it.
alpha is missing from a converted adapter, and the merge then takes alpha = r.

How it is told
W' = W + B A reproduces every element.

Evidence
right: the scale that was left out. survival: about r / alpha.

What to do
Multiply the product by alpha / r, or by alpha / sqrt(r) under rsLoRA, and merge again.

Seen in
Blaizzy/mlx-vlm#845, mflux-community/mflux#449, tdrussell/diffusion-pipe#15
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import rescaled
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """s = 1."""
    return rescaled(case, lambda scale: replace(scale, alpha=1.0, rank=1, weight=1.0))


FAULT = ValueFault(
    code="LC111",
    name="scale-one",
    severity="error",
    summary="scale left out",
    help="multiply the product by alpha / r and merge again",
    inject=inject,
    causes=("M10", "M38"),
)

"""LC108 alpha-not-divided

What it is
The delta was scaled by alpha itself, not by alpha / r.

How it happens
A re-implementation of the merge writes W + alpha B A.
A converter folded the division into the factors, and the merge assumed so of an adapter where it was not.
rsLoRA's root was multiplied in twice, by a combined adapter that took the flag over: look for use_rslora
there, and for the formula in a script of one's own.

How it is told
W' = W + alpha B A reproduces every element.

Evidence
scale, right: the scale that was used, and the right one. survival: about r, or
sqrt(r) under rsLoRA.

What to do
Divide alpha by the rank, or by its square root under rsLoRA, and merge again.

Seen in
Blaizzy/mlx-vlm#986, Blaizzy/mlx-vlm#845, hao-ai-lab/FastVideo#870
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import rescaled
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """s = alpha."""
    return rescaled(case, lambda scale: replace(scale, rank=1, rule="alpha/r"))


FAULT = ValueFault(
    code="LC108",
    name="alpha-not-divided",
    severity="error",
    summary="alpha not divided by r",
    help="divide alpha by the rank and merge again",
    inject=inject,
    causes=("M10", "M11"),
)

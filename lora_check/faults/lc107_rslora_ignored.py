"""LC107 rslora-ignored

What it is
The adapter was trained with rsLoRA, and merged with the plain scale alpha / r.

How it happens
The merging tool does not read use_rslora, or is older than it.
The flag was lost when the configuration was converted (TensorRT-LLM, exllamav2, lorax).

How it is told
W' = W + (alpha / r) B A reproduces every element, where alpha / sqrt(r) is right.

Evidence
scale, right: the scale that was used, and the right one. survival: about 1 / sqrt(r).

What to do
Merge with a tool that reads use_rslora: PEFT 0.8 or later does.

Seen in
NVIDIA/TensorRT-LLM#1668, turboderp-org/exllamav2#619, predibase/lorax#299, dphnAI/sonar#647
"""

from __future__ import annotations

from dataclasses import replace

from lora_check.faults._cases import rescaled
from lora_check.types import Case, ValueFault


def inject(case: Case) -> tuple[Case, ...]:
    """s = alpha / r."""
    return rescaled(case, lambda scale: replace(scale, rule="alpha/r"))


FAULT = ValueFault(
    code="LC107",
    name="rslora-ignored",
    severity="error",
    summary="rsLoRA ignored",
    help="merge with a tool that reads use_rslora",
    inject=inject,
    causes=("M11",),
)

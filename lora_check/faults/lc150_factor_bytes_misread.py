"""LC150 factor-bytes-misread

What it is
The bytes of a bf16 factor were decoded as fp16.

How it happens
A reader of its own (a runtime, a converter) has the dtype written into it and does not ask the header of the file.

How it is told
W' = W + s B' A' reproduces every element, with the bits of A or B or both taken for fp16 numbers. They all lie near 1
then, so the delta drowns the weight. fp16 read as bf16 gives numbers near 1e-13: nothing is added, and LC101 tells so.

Evidence
factors: which were read so.

What to do
Decode each tensor in the dtype that its header says, and merge again.

Seen in
paiml/aprender#2189
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_check.faults._rows import refactored, said
from lora_check.types import Case, LoadedStep, ValueFault

if TYPE_CHECKING:
    from torch import Tensor

CHOICES = ("A", "B", "AB")


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + s B' A', the 16-bit words of bf16 factors read as fp16."""
    if any(step.recipe.apply for step in case.steps):
        return ()
    return tuple(
        changed
        for chosen in CHOICES
        for changed in refactored(case, partial(_misread, chosen=chosen), factors=" and ".join(chosen))
    )


def _misread(step: LoadedStep, chosen: str) -> Mapping[str, Tensor]:
    import torch

    return {
        role: factor.contiguous().view(torch.float16)
        for role, factor in step.factors.items()
        if role[-1:] in chosen and factor.dtype == torch.bfloat16
    }


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Which factors."""
    return f"bytes of {said(told, 'factors')} decoded as fp16, and they are bf16"


FAULT = ValueFault(
    code="LC150",
    name="factor-bytes-misread",
    severity="error",
    summary="bf16 factors decoded as fp16",
    help="decode each tensor in the dtype that its header says, and merge again",
    inject=inject,
    tell=tell,
    causes=("M55",),
)

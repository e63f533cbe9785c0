"""LC144 fused-rank-shared

What it is
Each part of a fused projection has the delta of its own share of the rank alone: q of the first third, k of the second.

How it happens
A converter splits one lora_A of a fused projection among the parts, row by row, as if the parts had been fused from
factors of their own; the one lora_A belongs to all of them. Seen in converters of diffusion trainers.

How it is told
W' = W + s B' A reproduces every element, with B' zero but for the i-th 1/n of the columns in the rows of part i.

Evidence
parts: among how many parts the rank was divided.

What to do
Give each part the whole lora_A and its own rows of lora_B, and convert again.

Seen in
kohya-ss/sd-scripts#2204, mflux-community/mflux#423, sgl-project/sglang#16134
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_check.faults._rows import layouts, pairs, refactored, said
from lora_check.types import Case, LoadedStep, ValueFault

if TYPE_CHECKING:
    from torch import Tensor


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + s B' A, B' of blocks: the rows of part i, the i-th share of the rank."""
    if not pairs(case) or any(step.window for step in case.steps):
        return ()
    made: list[Case] = []
    for ways in layouts(case):
        for parts in list(ways.values())[:2]:
            ranks = [int(step.factors["A"].shape[0]) for step in case.steps]
            if all(rank % len(parts) == 0 for rank in ranks):
                made += refactored(case, partial(_shared, parts=parts), parts=len(parts))
    return tuple(made)


def _shared(step: LoadedStep, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """B with zeros outside the blocks."""
    b = step.factors["B"]
    share, kept = int(b.shape[1]) // len(parts), b.new_zeros(b.shape)
    for index, rows in enumerate(parts.values()):
        own = slice(index * share, (index + 1) * share)
        kept[rows, own] = b[rows, own]
    return {"B": kept}


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Among how many parts."""
    return f"the rank of a fused projection divided among its {said(told, 'parts')} parts"


FAULT = ValueFault(
    code="LC144",
    name="fused-rank-shared",
    severity="error",
    summary="the rank of a fused projection divided among its parts",
    help="give each part the whole lora_A and its own rows of lora_B, and convert again",
    inject=inject,
    tell=tell,
    causes=("M14",),
)

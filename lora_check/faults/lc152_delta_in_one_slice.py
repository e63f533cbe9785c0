"""LC152 delta-in-one-slice

What it is
The delta lies in one half, quarter or eighth of the rows or columns of a target; the rest holds the base.

How it happens
Tensor parallelism gives each rank a slice of a factor. The merge or the export took that of one rank and did not gather
the others, or ranks wrote one after the other into one file. Seen in trainers on Megatron and their bridges.

How it is told
W' = W + s B A in one slice, W outside it, reproduces every element; the slices of 2, 4 and 8 ranks are tried, by rows
and by columns.

Evidence
slice: the rows or columns that have the delta. part: which slice it is, of how many.

What to do
Gather the factors of all ranks before they are merged or saved, and merge again.

Seen in
NVIDIA-NeMo/Megatron-Bridge#5231, radixark/miles#3232, NVIDIA-NeMo/Megatron-Bridge#2194
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_check.faults._rows import is_pair, refactored, said, span
from lora_check.types import Case, LoadedStep, ValueFault

if TYPE_CHECKING:
    from torch import Tensor

RANKS = (2, 4, 8)
IN_OUT = ("lora-linear-in-out", "lora-embedding")
"""Recipes of weights that are kept (in, out): their rows are those of A^T."""


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + s (B A) within one slice of the rows or of the columns."""
    whole = all(_plain(step) and step.window is None for step in case.steps)
    return tuple(_slices(case)) if case.steps and whole else ()


def _plain(step: LoadedStep) -> bool:
    embedding = step.factors.keys() == {"embedding_A", "embedding_B"}
    return step.recipe.adds and (is_pair(step) or (embedding and step.recipe.method is None))


def _slices(case: Case) -> Iterator[Case]:
    for axis, noun in enumerate(("rows", "columns")):
        size = int(case.base.shape[axis])
        for ranks in RANKS:
            width = size // ranks
            for start in range(0, size, width) if size % ranks == 0 else ():
                part = f"slice {start // width + 1} of {ranks} of the {noun}"
                told = {"slice": span(start, start + width, size, noun), "part": part}
                yield from refactored(
                    case,
                    partial(_cut, axis=axis, start=start, width=width),
                    **told,
                )


def _cut(step: LoadedStep, axis: int, start: int, width: int) -> Mapping[str, Tensor]:
    """The factor of that axis of the weight, with zeros outside the slice."""
    outputs = (axis == 0) != (step.recipe.name in IN_OUT)
    role = next(role for role in step.factors if role[-1] == ("B" if outputs else "A"))
    factor = step.factors[role]
    kept = factor.new_zeros(factor.shape)
    own = (slice(start, start + width), slice(None)) if outputs else (slice(None), slice(start, start + width))
    kept[own] = factor[own]
    return {role: kept}


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Which slice."""
    return f"delta in one slice of the tensor alone ({said(told, 'part')})"


FAULT = ValueFault(
    code="LC152",
    name="delta-in-one-slice",
    severity="error",
    summary="delta in one slice of the tensor alone",
    help="gather the factors of all ranks before they are merged or saved, and merge again",
    inject=inject,
    tell=tell,
    causes=("M39",),
)

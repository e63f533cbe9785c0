"""LC149 factor-buffer-reread

What it is
The numbers of a factor were read row by row in the shape of its transpose, in place of being transposed.

How it happens
One tool keeps lora_A as (r, in), another as (in, r) with inputs first, as MLX and kernels for stacked requests do. A
converter that changes the shape and leaves the bytes (reshape, view) gets a factor of the right size with its numbers
shuffled: norms agree, and nothing complains.

How it is told
W' = W + s B' A' reproduces every element, with A' or B' or both read again from their own bytes in the other shape.

Evidence
factors: which were read so.

What to do
Transpose the factor in place of reshaping it, or mend the shape that the reader assumes, and convert again.

Seen in
paiml/aprender#2138, lablup/mlxcel#925, ml-explore/mlx-lm#1120, microsoft/LoRA#105
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_check.faults._rows import refactored, said
from lora_check.types import Case, LoadedStep, ValueFault

if TYPE_CHECKING:
    from torch import Tensor

CHOICES = ("A", "B", "AB")


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + s B' A': A (r, in) read as (in, r) and turned, or kept as (in, r) and read as (r, in); B likewise."""
    return tuple(_injected(case))


def _injected(case: Case) -> Iterator[Case]:
    for read in (_read_as_transpose, _kept_as_transpose):
        for chosen in CHOICES:
            yield from refactored(case, partial(_reread, read=read, chosen=chosen), factors=" and ".join(chosen))


def _reread(step: LoadedStep, read: Any, chosen: str) -> Mapping[str, Tensor]:
    """The matrices among the chosen factors, read again; of an embedding's factors too."""
    if step.recipe.method is not None or step.recipe.stacked:
        return {}
    pair = {role: factor for role, factor in step.factors.items() if role[-1] in chosen and _is_factor(role, factor)}
    return {role: read(factor) for role, factor in pair.items()}


def _is_factor(role: str, factor: Tensor) -> bool:
    return role in ("A", "B", "embedding_A", "embedding_B") and factor.ndim == 2 and min(factor.shape) > 1


def _read_as_transpose(factor: Tensor) -> Tensor:
    rows, columns = factor.shape
    return factor.reshape(columns, rows).T


def _kept_as_transpose(factor: Tensor) -> Tensor:
    return factor.T.reshape(factor.shape)


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Which factors."""
    return f"{said(told, 'factors')} reshaped in place of transposed"


FAULT = ValueFault(
    code="LC149",
    name="factor-buffer-reread",
    severity="error",
    summary="factors reshaped in place of transposed",
    help="transpose the factor in place of reshaping it, and convert again",
    inject=inject,
    tell=tell,
    causes=("M23",),
)

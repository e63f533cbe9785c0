"""LC157 merged-into-quantised-base

What it is
The delta was added to a version of BASE that had been rounded to few levels, by a quantiser that is not known here.

How it happens
A model in 4-bit codes with double quantisation, or one of GPTQ, AWQ, HQQ, MLX or llama.cpp, was decoded and merged, and
its float original is given as BASE. A quantised download took the place of the original one.

How it is told
MERGED - s B A has no more than 16 different values in each block of 32, 64 or 128 elements of a row, up to what a merge
may round, while BASE has more, and lies no low-rank update away, which is no error of a quantiser (LC163, LC168).
Looked at last, where no known quantiser reproduces the tensor (LC155, LC156).

Evidence
block: elements in a block. error_over_delta: |MERGED - s B A - BASE| against |s B A|.

What to do
Decide which of the two the adapter is to be used with: merge into BASE, or give the decoded base as BASE.

Seen in
unslothai/unsloth-zoo#810, casper-hansen/AutoAWQ#85, huggingface/peft#2321
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_check.faults._cases import never
from lora_check.faults._findings import listed
from lora_check.faults._levels import BLOCKS, LEVELS, on_levels
from lora_check.faults._low_rank import difference
from lora_check.faults._quantised_base import error_over_delta
from lora_check.faults._residuals import additive, residuals
from lora_check.types import Case, ValueFault

if TYPE_CHECKING:
    from torch import Tensor


def recognise(case: Case, actual: Tensor) -> dict[str, Any] | None:
    """The first size of blocks in which what is left of the base has few levels."""
    columns = int(case.base.shape[1])
    plain = case.codes is None and case.grid is None and case.base.is_floating_point() and additive(case)
    sizes = [size for size in BLOCKS if columns % size == 0]
    found = next((told for size in sizes if (told := _in_blocks(case, actual, size))), None) if plain else None
    return None if found and _is_of_low_rank(case, actual) else found


def _is_of_low_rank(case: Case, actual: Tensor) -> bool:
    """Whether what is left lies a low-rank update away from BASE: then BASE was changed, and not quantised."""
    one = difference(case, actual)
    return one is not None and one.beside.rank is not None


def _in_blocks(case: Case, actual: Tensor, size: int) -> dict[str, Any] | None:
    from lora_check.rounding import UNLIKE

    blocks = telling = 0
    error = delta = 0.0
    for one in residuals(case, actual):
        count, informative, few = on_levels(one.left, one.room, one.base, size)
        if few < informative or not (blocks or informative):
            return None
        blocks, telling = blocks + count, telling + informative
        error, delta = error + _square(one.error), delta + _square(one.delta)
    if telling < UNLIKE * blocks:
        return None
    return {"block": size} | ({"error_over_delta": (error / delta) ** 0.5} if delta else {})


def _square(x: Tensor) -> float:
    return float(x.square().sum().item())


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """The size of the blocks, and how far that base is from BASE."""
    sizes = listed(dict.fromkeys(str(one["block"]) for one in told))
    return f"merged into a base of {LEVELS} levels or fewer in each block of {sizes}, {error_over_delta(told)}".rstrip(
        ", "
    )


FAULT = ValueFault(
    code="LC157",
    name="merged-into-quantised-base",
    severity="error",
    summary="merged into a quantised version of BASE, decoded",
    help="merge into BASE itself, or give the decoded quantised base as BASE",
    inject=never,
    recognise=recognise,
    tell=tell,
    kinds=("target", "bystander"),
    causes=("M09",),
)

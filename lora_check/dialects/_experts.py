"""Factors of a mixture of experts, one pair for each: A (experts, r, in) and B (experts, out, r).

A recipe for a stack of experts reads them side by side: A (experts r, in), expert by expert, and B (out, r experts),
whose columns e, e + experts, e + 2 experts ... are those of expert e.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING

from lora_check.dialects._shared import Shape, reshaped
from lora_check.types import View

if TYPE_CHECKING:
    from torch import Tensor


def are_stacked(a: Shape, b: Shape) -> bool:
    """Whether two tensors are the factors of as many experts as B has."""
    return len(b) == 3 and len(a) in (2, 3) and 0 not in b and prod(a[:-1]) == b[0] * b[2]


def side_by_side(a: Shape, b: Shape) -> dict[str, View]:
    """The views of A and B over a weight that stacks all experts.

    a   (experts, r, in) or (experts r, in)          b   (experts, out, r)
    """
    experts, outputs, rank = b
    return {
        "A": reshaped((experts * rank, a[-1])),
        "B": View(moved=_interleaved, size=(outputs, rank * experts)),
    }


def one_of(expert: int, a: Shape, b: Shape) -> dict[str, View]:
    """The views of A and B over the weight of one expert."""
    _, outputs, rank = b
    return {
        "A": View(moved=partial(_rows, expert=expert, rank=rank), size=(rank, a[-1])),
        "B": View(moved=partial(_matrix, expert=expert), size=(outputs, rank)),
    }


def _interleaved(stored: Tensor) -> Tensor:
    return stored.permute(1, 2, 0).reshape(stored.shape[1], -1)


def _rows(stored: Tensor, expert: int, rank: int) -> Tensor:
    return stored.reshape(-1, stored.shape[-1])[expert * rank : (expert + 1) * rank]


def _matrix(stored: Tensor, expert: int) -> Tensor:
    return stored[expert]

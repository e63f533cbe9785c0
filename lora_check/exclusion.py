"""Hypotheses that a few rows exclude at once, whatever the order of operations: cheaper than balls, and coarser.

Most mistakes did not write a given tensor, and most of those show it in any handful of elements. Only W + s B A is
judged here, in float64; of anything else, and of what this bound does not exclude, balls decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_check.number_kinds import any_error
from lora_check.replay import expected
from lora_check.rounding import any_path
from lora_check.types import Case, LoadedStep


def excluded(case: Case, rows: Tensor, span: slice) -> bool:
    """Whether no order of operations can have written these rows; False, if that is not known.

    rows   (rows, columns), in the storage dtype
    """
    pairs = [factors_of(step) for step in case.steps]
    if case.grid is not None or case.through or not all(pairs):
        return False
    relative, absolute = any_path(len(pairs), *any_error(case))
    sizes = [abs(step.s) * largest_product(*pair) for step, pair in zip(case.steps, pairs, strict=True) if pair]
    slips = [abs(step.s) * _largest_slip(*pair) for step, pair in zip(case.steps, pairs, strict=True) if pair]
    seen = expected(case).rows(span)
    reach = relative * (seen.base.abs() + sum(sizes)) + absolute * (1 + sum(slips))
    return bool(((rows.to(seen.total.dtype) - seen.total).abs() > reach).any())


def factors_of(step: LoadedStep) -> tuple[Tensor, Tensor] | None:
    """A and B of a step that adds s B A and does nothing else."""
    recipe = step.recipe
    if not recipe.adds or recipe.scaled or recipe.prepare or recipe.reads:
        return None
    pair = [step.factors[role] for role in ("A", "B", "embedding_A", "embedding_B") if role in step.factors]
    return (pair[0], pair[1]) if len(pair) == len(step.factors) == 2 else None


def largest_product(a: Tensor, b: Tensor) -> float:
    """|B| |A| at most, for any element: the longest row of B times the longest column of A (Cauchy, Schwarz).

    Lengths in the factors' own precision, and never in less than fp32: `any_path` and `between_orders` allow for it.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    columns, rows = a.reshape(a.shape[0], -1).to(wide), b.reshape(b.shape[0], -1).to(wide)
    return float(torch.linalg.vector_norm(rows, dim=1).max() * torch.linalg.vector_norm(columns, dim=0).max())


def _largest_slip(a: Tensor, b: Tensor) -> float:
    """How far B A moves at most if every element of A and B moves by one, for each unit: r (max |A| + max |B| + 1)."""
    return int(a.shape[0]) * (float(a.abs().max()) + float(b.abs().max()) + 1.0)

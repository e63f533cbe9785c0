"""Weighted sums of tensors that were pruned, or whose signs were voted on; over Tensor and Ball alike.

Source: PEFT utils/merge_utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_check.types import Numbers, Options


def weighted_sum(tensors: Sequence[Numbers], weights: Sequence[float], options: Options) -> Numbers:
    """sum_i w_i T_i, added from the left (task_arithmetic)."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + tensor * weight
    return total


def pruned_sum(tensors: Sequence[Numbers], weights: Sequence[float], options: Options) -> Numbers:
    """The same with the largest `density` of each tensor (magnitude_prune)."""
    from lora_check.selections import largest

    return weighted_sum([largest(one, options.density) for one in tensors], weights, options)


def elected_mean(tensors: Sequence[Numbers], weights: Sequence[float], options: Options) -> Numbers:
    """The mean of those w_i T_i whose sign before weighting is the elected one, the tensors pruned first (ties)."""
    from lora_check.selections import agreeing_mean, largest

    kept: list[Any] = [largest(one, options.density) for one in tensors]
    return agreeing_mean(kept, weights, options.majority_sign_method)

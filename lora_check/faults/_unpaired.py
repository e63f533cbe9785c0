"""Names that only one side has, though the numbers behind them may be on both."""

from __future__ import annotations

import difflib
import re

from lora_check.faults._wrapped import unwrapped
from lora_check.types import Plan

_NUMBER = re.compile(r"\d+")


def unpaired(plan: Plan) -> dict[str, str]:
    """Missing name -> the extra name it may have become: the most alike of the same shape, or one of the same total.

    Nothing is paired by this. It only says that a missing tensor need not be missing.
    """
    told = unwrapped(plan)
    missing = {name: shape for name, shape in plan.missing_shapes.items() if name not in told}
    extra = {name: shape for name, shape in plan.extra_shapes.items() if name not in told}
    pairs: dict[str, str] = {}
    for name, shape in missing.items():
        candidates = [one for one, other in extra.items() if other == shape]
        if candidates:
            pairs[name] = max(candidates, key=lambda one: _alike(name, one))
            del extra[pairs[name]]
    rest = {name: shape for name, shape in missing.items() if name not in pairs}
    if rest and extra and _numel(rest) == _numel(extra):
        first = next(iter(extra))
        pairs |= dict.fromkeys(rest, first)
    return pairs


def _alike(one: str, other: str) -> float:
    same_number = _NUMBER.findall(one) == _NUMBER.findall(other)
    return same_number + difflib.SequenceMatcher(None, one, other).ratio()


def _numel(shapes: dict[str, tuple[int, ...]]) -> int:
    total = 0
    for shape in shapes.values():
        size = 1
        for axis in shape:
            size *= axis
        total += size
    return total

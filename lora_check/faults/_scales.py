"""Factors on the delta, as single tensors were told to have them: what the patterns over families share."""

from __future__ import annotations

from collections.abc import Sequence

from lora_check.types import Comparison, Verdict

SCALED = ("LC102", "LC110")
"""The codes of a delta that is a number of times too large or too small."""


def telling(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The targets that can show the size of their delta."""
    targets = [one for one in comparisons if one.kind == "target"]
    return [one for one in targets if one.verdict is not Verdict.INCONCLUSIVE and one.signal > 0 and not one.vanished]


def factor_fits(one: Comparison, factor: float) -> bool:
    """Whether that factor is the one replayed or in the range that was fitted; equal factors written twice agree."""
    from lora_check.rounding import unit

    if one.code == "LC102" and "adapter" not in one.told:
        return float(one.told.get("times", 2)) == factor
    if one.code != "LC110":
        return False
    fitted = float(one.told.get("factor", 0.0))
    low, high = float(one.told.get("factor_low", fitted)), float(one.told.get("factor_high", fitted))
    slack = unit("float32") * factor
    return low - slack <= factor <= high + slack

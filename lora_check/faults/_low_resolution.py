"""Targets that are right, and whose storage keeps less of the delta than it loses."""

from __future__ import annotations

from lora_check.types import FLOATS, Comparison

AGAIN = "quantised-again"
"""The end of an arithmetic that quantised the merge as the base is and decoded it."""


def in_codes(one: Comparison) -> bool:
    """Whether the merge was rounded to codes."""
    return one.dtype not in FLOATS or (one.arithmetic or "").endswith(AGAIN)


def lost(one: Comparison) -> bool:
    """Whether what was lost is larger than the delta, or than what is left of it."""
    from lora_check.rounding import LOST_SNR_DB, LOST_SURVIVAL

    if one.snr_db is None:
        return False  # nothing was lost
    return one.snr_db < LOST_SNR_DB or (one.survival is not None and one.survival < LOST_SURVIVAL)

"""Formulas in which a merged row is made of several rows: all of them are made beforehand, from the whole weight."""

from __future__ import annotations

from lora_check.types import Factors, Hand, Numbers


def apply(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """The rows made beforehand."""
    return factors["made"][rows]

"""Evidence of many tensors in few words: the scales that were used, what was ignored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_check.faults._findings import listed

Told = Sequence[Mapping[str, Any]]
FEW = 3
"""So many different values a summary lists; of more it tells the least and the largest."""


def number(value: float) -> str:
    """'2', '1.667', '0.5'."""
    return f"{value:.4g}"


def each(values: Iterable[Any]) -> list[Any]:
    """The different ones, most frequent first."""
    every = list(values)
    return sorted(dict.fromkeys(every), key=lambda one: -every.count(one))


def numbers(values: Iterable[float]) -> str:
    """'2', '2 and 1.667', '0.5 to 4'."""
    words = each(map(number, values))
    return listed(words) if len(words) <= FEW else f"{min(words, key=float)} to {max(words, key=float)}"


def instead(told: Told) -> str:
    """'2 in place of 1.667', where every tensor says both; else nothing."""
    if not all({"scale", "right"} <= one.keys() for one in told):
        return ""
    return f"{numbers(one['scale'] for one in told)} in place of {numbers(one['right'] for one in told)}"


def ways(told: Told, key: str) -> str:
    """What the tensors say under that key: 'a', 'a and b', 'a in most'; nothing, if they say nothing."""
    words = each(str(one[key]) for one in told if key in one)
    return "" if not words else listed(words) if len(words) <= FEW else f"{words[0]} in most"

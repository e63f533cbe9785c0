"""Numbers of a configuration that only one method reads."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isfinite
from typing import Any


def real(raw: Mapping[str, Any], key: str, default: float) -> float:
    """The number under a key, or PEFT's default where the configuration is silent.

    raises   ValueError: it is no finite number
    """
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise ValueError(f"the configuration has {key} = {value!r}, not a number")
    return value


def whole(raw: Mapping[str, Any], key: str, default: int, least: float = -inf) -> int:
    """The same for a whole number of at least `least`.

    raises   ValueError: it is no such number
    """
    value = real(raw, key, default)
    if value != int(value) or value < least:
        raise ValueError(f"the configuration has {key} = {value!r}, not a whole number that can be")
    return int(value)

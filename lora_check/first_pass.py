"""Rows of a tensor under one arithmetic: what was seen of them, and what that makes of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_check.types import Arithmetic, Case


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What the first pass saw in a range of rows."""

    exact: bool
    signal: float


def part(case: Case, actual: Any, how: Arithmetic, rows: slice) -> Part | None:
    """None: these rows want a closer look."""
    return None


def whole(parts: Sequence[Part | None], how: Arithmetic) -> Any:
    """None: the tensor wants a closer look."""
    return None


def copy_part(case: Case, actual: Any, rows: slice) -> bool:
    """Whether the bytes are the same."""
    from lora_check.compare import same_bits

    return same_bits(case.base[rows], actual[rows])

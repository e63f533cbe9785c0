"""Findings, worded alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_check.types import Finding, PatternFault, PlanFault


def found(fault: PlanFault | PatternFault, message: str, tensors: Iterable[str] = (), **evidence: Any) -> Finding:
    """A finding of that fault."""
    return Finding(
        code=fault.code,
        name=fault.name,
        severity=fault.severity,
        message=message,
        tensors=tuple(dict.fromkeys(tensors)),
        help=fault.help,
        evidence=evidence,
    )


def many(count: int, noun: str) -> str:
    """'1 tensor', '3 tensors'."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: Iterable[str], limit: int = 4) -> str:
    """'a', 'a and b', 'a, b and c'; of more than `limit` names the first ones and a count."""
    every = list(names)
    shown = every[:limit] if len(every) <= limit else [*every[: limit - 1], f"{len(every) - limit + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"

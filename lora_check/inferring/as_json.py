"""Inference -> the JSON contract: `schema` 1, keys are added and never renamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lora_check.inferring.extracting import Extracted
from lora_check.inferring.outcome import Change, Inference, Kind
from lora_check.inferring.words import remarks, says
from lora_check.report import SCHEMA
from lora_check.versions import versions


def as_dict(found: Inference, extracted: Extracted | None = None) -> dict[str, Any]:
    """The whole outcome, and the adapter that was written, if one was."""
    kinds = Counter(one.kind.value for one in found.changes)
    outcome: dict[str, Any] = {
        "schema": SCHEMA,
        "tool": versions(),
        "command": "infer",
        "inputs": {"base": dict(found.base), "merged": dict(found.merged)},
        "says": says(found),
        "remarks": remarks(found),
        "exit_code": found.exit_code,
        "summary": {"tensors": len(found.changes), "seconds": found.seconds, **dict(kinds)},
        "families": [_family(name, members) for name, members in found.families.items()],
        "missing": list(found.missing),
        "extra": list(found.extra),
        "tensors": [one.as_dict() for one in found.changes],
    }
    return outcome if extracted is None else {**outcome, "extracted": extracted.as_dict()}


def _family(name: str, members: Sequence[Change]) -> dict[str, Any]:
    return {
        "family": name,
        "tensors": len(members),
        "kinds": dict(Counter(one.kind.value for one in members)),
        "ranks": dict(Counter(str(one.rank) for one in members if one.kind is Kind.LOW_RANK)),
    }

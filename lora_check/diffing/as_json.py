"""Difference -> the JSON contract: `schema` 1, keys are added and never renamed."""

from __future__ import annotations

import math
from typing import Any

from lora_check.diffing.nouns import Answer, Difference, Entry, Group, Shown, Sizes, Value
from lora_check.diffing.words import complaint, hint
from lora_check.reading.throughput import speed
from lora_check.report import SCHEMA
from lora_check.types import TensorMeta, Verdict


def as_dict(found: Difference) -> dict[str, Any]:
    """The whole outcome; a number that JSON cannot hold is null. `verdict` is null where nothing was expected."""
    return {
        "schema": SCHEMA,
        "tool": dict(found.tool),
        "command": "diff",
        "inputs": {"a": dict(found.a), "b": dict(found.b)},
        "verdict": found.verdict.value if found.verdict else None,
        "exit_code": found.exit_code,
        "summary": _summary(found),
        "families": [{"family": one.name, **_group(one)} for one in found.families],
        "findings": [_finding(one) for one in found.answers if one.verdict is not Verdict.VERIFIED],
        "expectations": [_answer(one) for one in found.answers],
        "shown": [_shown(one) for one in found.shown],
        "tensors": [_entry(one) for one in found.entries],
    }


def _summary(found: Difference) -> dict[str, Any]:
    read = sum(meta.nbytes for one in found.entries if one.sizes for meta in (one.a, one.b) if meta)
    return {**_group(found.total), "bytes_read": read, "seconds": round(found.seconds, 3), **speed(found.throughput)}


def _group(one: Group) -> dict[str, Any]:
    counts = {status.replace(" ", "_").lower(): count for status, count in one.counts.items()}
    return {
        "tensors": one.tensors,
        **{key: counts.get(key, 0) for key in KEYS},
        "moved": one.moved,
        "sizes_of_changed": _sizes(one.sizes),
    }


KEYS = ("changed", "reshaped", "retyped", "only_in_a", "only_in_b", "unread", "skipped", "unchanged")


def _sizes(one: Sizes) -> dict[str, Any]:
    return {
        "elements": one.elements,
        "differing": one.differing,
        "differing_in_bits_only": one.in_bits,
        "largest": _number(one.largest) if one.counted else None,
        "place": list(one.place) if one.place is not None else None,
        "place_not_finite": list(one.odd) if one.odd is not None else None,
        "norm": _number(one.norm),
        "relative": _number(one.relative),
        "cosine": _number(one.cosine),
        "left_out": one.left_out,
        "nan": {"a": one.a.nan, "b": one.b.nan},
        "infinite": {"a": one.a.infinite, "b": one.b.infinite},
    }


def _entry(one: Entry) -> dict[str, Any]:
    told = {"conversion": one.conversion, "tied": one.tied, "reason": one.reason, "rows_compared": one.rows}
    return {
        "name": one.name,
        "other_name": one.other or None,
        "family": one.family,
        "status": one.status,
        "a": _meta(one.a),
        "b": _meta(one.b),
        **(_sizes(one.sizes) if one.sizes else {}),
        **{key: value for key, value in told.items() if value},
    }


def _meta(one: TensorMeta | None) -> dict[str, Any] | None:
    return {"shape": list(one.shape), "dtype": one.stored_as} if one else None


def _answer(one: Answer) -> dict[str, Any]:
    return {
        "expected": one.kind,
        "glob": one.glob,
        "verdict": one.verdict.value,
        "matched": one.matched,
        "against": dict(one.against),
        "undecided": dict(one.open),
    }


def _finding(one: Answer) -> dict[str, Any]:
    """In the form of a report's findings; no code, for it is no mistake of a merge that has a page."""
    names = [*one.against, *one.open]
    return {
        "code": None,
        "name": f"not-{one.kind}" if one.verdict is Verdict.REFUTED else "not-decided",
        "severity": "error" if one.verdict is Verdict.REFUTED else "warning",
        "message": complaint(one),
        "help": hint(one),
        "count": len(names),
        "tensors": names,
        "evidence": {"expected": one.kind, "glob": one.glob, "matched": one.matched},
    }


def _shown(one: Shown) -> dict[str, Any]:
    told = {"more": one.more, "reason": one.reason}
    values = [
        {"place": list(value.place), "a": _value(value.a), "b": _value(value.b), "difference": _apart(value)}
        for value in one.values
    ]
    return {"name": one.name, "index": one.index or None, "values": values} | {k: v for k, v in told.items() if v}


def _apart(one: Value) -> Any:
    return None if one.a is None or one.b is None else _value(one.b - one.a)


def _value(value: complex | None) -> Any:
    """A number; of what JSON cannot hold, its name."""
    if isinstance(value, complex):
        return [_value(value.real), _value(value.imag)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

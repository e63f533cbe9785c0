"""A forward as JSON: the report of the weights, its verdict and exit code those of both, and `forward` beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lora_check.forwarding import words
from lora_check.forwarding.nouns import Departure, Forward


def as_dict(found: Forward) -> dict[str, Any]:
    """Schema 1, with keys added."""
    return found.report.as_dict() | {
        "verdict": found.verdict.value,
        "exit_code": found.verdict.exit_code,
        "forward": _finite(_forward(found)),
    }


def _forward(found: Forward) -> dict[str, Any]:
    first = found.first
    return {
        "answer": found.answer,
        "says": words.sentence(found),
        "weights": found.report.verdict.value,
        "kind": found.kind.name,
        "modules": found.lockstep.modules,
        "idle": list(found.lockstep.idle),
        "first": None if first is None else _departure(found, first),
        "departures": [_departure(found, one) for one in found.lockstep.departures],
        "arrivals": {
            name: {"share": share, "budget": budget} for name, (share, budget) in found.lockstep.arrivals.items()
        },
        "unjudged": found.lockstep.unjudged,
        "pairs": [asdict(one) for one in found.pairs],
        "perplexity": dict(found.perplexities),
        "partings": [asdict(one) for one in found.partings],
        "sequences": [_sequence(found, place) for place in range(len(found.asked))],
        "differences": {
            name: {key: list(values) for key, values in keys.items()} for name, keys in found.differences.items()
        },
        "tokens": dict(found.tokens),
        "remarks": list(found.remarks),
        "circumstances": dict(found.circumstances),
        "seconds": round(found.seconds, 3),
    }


def _departure(found: Forward, one: Departure) -> dict[str, Any]:
    told = found.weights.get(one.place, ())
    weight = {"verdict": told[0] if told else None, "codes": list(told[1:])}
    return asdict(one) | {"weight": weight}


def _sequence(found: Forward, place: int) -> dict[str, Any]:
    one = found.asked[place]
    talking = {name: each.new[place] for name, each in found.said.items() if each.new and one.goes_on}
    new = {name: {"ids": list(ids), "text": found.spoken[name][place]} for name, ids in talking.items()}
    return {"ids": list(one.ids), "text": one.text, "goes_on": one.goes_on, "cut": one.cut, "new": new}


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value

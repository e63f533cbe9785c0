"""Many merges to check, named in a file of JSON lines.

One object a line; a blank line is nobody's. A location means what it means on the command line: a path from the working
folder, or a hub id.

  {"base": "base", "adapter": "run-1", "merged": "run-1-merged"}
  {"id": "both", "base": "base", "adapters": ["run-1", "run-2"], "merged": "out", "weights": [0.7, 0.3]}

base, merged         a location each
adapter or adapters  one location, or several in the order of their merging
weights              a factor for each adapter      combination   how PEFT combined them, as --combination has it
id                   text or a whole number that no other line has
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lora_check.errors import InputError
from lora_check.inputs import is_weight

KEYS = ("id", "base", "adapter", "adapters", "merged", "weights", "combination")
FORM = 'write {"base": ..., "adapter": ..., "merged": ...} on each line; also adapters, weights, combination, id'


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One merge to check. `number` is that of its line in the file, counted from 1."""

    number: int
    base: str
    adapters: tuple[str, ...]
    merged: str
    weights: tuple[float, ...] | None = None
    combination: str | None = None
    id: str | int | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The locations, as the line has them."""
        return {"base": self.base, "adapters": list(self.adapters), "merged": self.merged}


def read(path: str) -> tuple[Line, ...]:
    """Every line of a manifest.

    raises   InputError: it cannot be read, it is empty, or a line of it is not as it must be; the message says which
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"manifest {path} cannot be read: {reason}", hint="give a file of JSON lines") from error
    lines = tuple(
        _line(number, text, f"manifest {path}, line {number}")
        for number, text in enumerate(raw.split(b"\n"), 1)
        if text.strip()
    )
    if not lines:
        raise InputError(f"manifest {path} names no merge to check", hint=FORM)
    _refuse_one_id_twice(path, lines)
    return lines


def _line(number: int, raw: bytes, where: str) -> Line:
    told = {key: value for key, value in _object(raw, where).items() if value is not None}
    unknown = [key for key in told if key not in KEYS]
    if unknown:
        raise InputError(f"{where}: {unknown[0]!r} is no key of a manifest", hint=f"the keys are {', '.join(KEYS)}")
    adapters = _adapters(told, where)
    return Line(
        number=number,
        base=_location(told, "base", where),
        adapters=adapters,
        merged=_location(told, "merged", where),
        weights=_weights(told["weights"], len(adapters), where) if "weights" in told else None,
        combination=_text(told["combination"], "combination", where) if "combination" in told else None,
        id=_id(told["id"], where) if "id" in told else None,
    )


def _object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object of one line, in which no key occurs twice."""

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        """An object of these pairs, unless a key is among them twice."""
        times = Counter(key for key, _ in pairs).most_common(1)
        if times and times[0][1] > 1:
            raise InputError(f"{where}: {times[0][0]!r} is named twice", hint=FORM)
        return dict(pairs)

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}, column {error.colno}: not JSON: {error.msg.lower()}", hint=FORM) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where}, byte {error.start + 1}: not UTF-8", hint=FORM) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {str(error).lower()}", hint=FORM) from error
    if not isinstance(found, dict):
        raise InputError(f"{where}: a {type(found).__name__} where an object belongs", hint=FORM)
    return found


def _location(told: Mapping[str, Any], key: str, where: str) -> str:
    if key not in told:
        raise InputError(f"{where}: {key!r} is missing", hint=FORM)
    return _text(told[key], key, where)


def _adapters(told: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if ("adapter" in told) == ("adapters" in told):
        problem = "both 'adapter' and 'adapters' are there" if "adapter" in told else "'adapter' is missing"
        raise InputError(f"{where}: {problem}", hint="give one location as adapter, or a list of them as adapters")
    if "adapter" in told:
        return (_text(told["adapter"], "adapter", where),)
    several = told["adapters"]
    if not isinstance(several, list) or not several:
        _wrong("adapters", "a list of locations", where)
    return tuple(_text(one, "adapters", where) for one in several)


def _weights(value: Any, count: int, where: str) -> tuple[float, ...]:
    """A factor for each adapter; what JSON writes as NaN or Infinity is none."""
    if not isinstance(value, list) or not all(map(is_weight, value)):
        _wrong("weights", "a list of finite numbers", where)
    if len(value) != count:
        raise InputError(f"{where}: {len(value)} weights for {count} adapters", hint="give one for each adapter")
    return tuple(float(one) for one in value)


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        _wrong(key, "text", where)
    return str(value)


def _id(value: Any, where: str) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        _wrong("id", "text or a whole number", where)
    return value


def _wrong(key: str, wanted: str, where: str) -> NoReturn:
    raise InputError(f"{where}: {key!r} has to be {wanted}", hint=FORM)


def _refuse_one_id_twice(path: str, lines: Sequence[Line]) -> None:
    first: dict[str | int, int] = {}
    for line in lines:
        if line.id is not None and first.setdefault(line.id, line.number) != line.number:
            message = f"manifest {path}, line {line.number}: line {first[line.id]} has the id {line.id!r} too"
            raise InputError(message, hint="give each line an id of its own, or none")

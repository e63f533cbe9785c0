"""Results <-> the JSON file of a run: one line a cell, whole after every cell, strict.

    {"schema": 1, "benchmark": "latency", "environment": {...}, "ceilings": {...}, "cells": [one a line]}

Inside are the nouns, field by field. Seconds are written with every digit. JSON has no NaN and no infinity: those are
the strings "nan", "inf", "-inf". Keys are added, never renamed.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from benchmarks.latency.nouns import Ceilings, Measured, Results
from lora_check.errors import InputError, UsageError

SCHEMA = 1
BENCHMARK = "latency"

ADDED: frozenset[str] = frozenset()
"""`Noun.field` of what is younger than the schema: a file may lack it, and has then the default."""

FINISHED = "finished"
"""Of an environment: false until the last cell was measured."""

HINT = "give a file that `python -m lora_check bench` wrote"


class _WrongError(ValueError):
    """A value that is not what belongs in its place: `where: what`."""


# ------------------------------------------------------------------------------------------------------- writing


class Kept:
    """The file of a run that goes on: after every cell it holds all cells so far, and says whether that was all.

    raises   UsageError: it cannot be written
    """

    def __init__(self, file: Path, environment: Mapping[str, object], ceilings: Ceilings) -> None:
        self._file = file
        self._ceilings = ceilings
        self._environment = environment
        self._cells: list[str] = []
        self._write(finished=False)

    def add(self, measured: Measured) -> None:
        """One more cell."""
        self._cells.append(_json(encoded(measured)))
        self._write(finished=False)

    def end(self, environment: Mapping[str, object]) -> None:
        """Nothing follows; the environment with what is only known in the end."""
        self._environment = environment
        self._write(finished=True)

    def _write(self, *, finished: bool) -> None:
        _replace(self._file, _text({**self._environment, FINISHED: finished}, self._ceilings, self._cells))


def save(results: Results, file: Path) -> None:
    """Write the file whole or not at all.

    raises   UsageError: it cannot be written
    """
    _replace(file, _text(results.environment, results.ceilings, [_json(encoded(one)) for one in results]))


def as_dict(results: Results) -> dict[str, Any]:
    """What the file of these results holds: `load` takes it, however its JSON is laid out."""
    return {"schema": SCHEMA, "benchmark": BENCHMARK, **encoded(results)}


def encoded(value: object) -> Any:
    """A noun, or what a noun holds, as JSON can say it."""
    if is_dataclass(value):
        return {one.name: encoded(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encoded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _text(environment: Mapping[str, object], ceilings: Ceilings, cells: Sequence[str]) -> str:
    head = {"schema": SCHEMA, "benchmark": BENCHMARK, "environment": environment, "ceilings": ceilings}
    lines = [f"{_json(key)}: {_json(encoded(value))}," for key, value in head.items()]
    return "\n".join(["{", *lines, '"cells": [', ",\n".join(cells), "]", "}"]) + "\n"


_json = partial(json.dumps, allow_nan=False)


def _replace(file: Path, text: str) -> None:
    part: Path | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.", delete=False) as opened:
            part = Path(opened.name)
            opened.write(text)
        part.chmod(0o644)
        part.replace(file)
    except BaseException as error:
        if part is not None:
            with suppress(OSError):
                part.unlink()
        if isinstance(error, OSError):
            said = error.strerror or type(error).__name__
            raise UsageError(f"cannot write results to {file}: {said}", hint="choose another file") from error
        raise


# ------------------------------------------------------------------------------------------------------- reading


def load(file: Path) -> Results:
    """The results that a file holds.

    raises   InputError: there is no such file, it holds something else, or of another schema
    """
    found = _parsed(file)
    if not isinstance(found, dict) or found.get("benchmark") != BENCHMARK:
        raise InputError(f"{file}: holds no results of the latency benchmark", hint=HINT)
    if found.get("schema") != SCHEMA:
        hint = "read it with the version that wrote it, or measure again"
        raise InputError(f"{file}: schema {found.get('schema')!r} of its results is not {SCHEMA}", hint=hint)
    try:
        results: Results = decoded(Results, found)
    except _WrongError as error:
        raise InputError(f"{file}: damaged results: {error}", hint="measure again, or restore the file") from error
    return results


def stored(folder: Path) -> dict[Path, Results]:
    """All results of this benchmark that lie in the folders of a folder, by file; others' files are passed over.

    raises   InputError: one that is of this benchmark, or of nobody, cannot be read
    """
    return {file: load(file) for file in sorted(folder.glob("*/*.json")) if ours(file)}


def ours(file: Path) -> bool:
    """Whether it is of this benchmark; what is not even JSON is for `load` to complain of."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return True
    return isinstance(found, dict) and found.get("benchmark") == BENCHMARK


def _parsed(file: Path) -> object:
    try:
        return json.loads(file.read_bytes(), parse_constant=_refused)
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file of results", hint=HINT) from None
    except OSError as error:
        raise InputError(f"{file}: results cannot be read: {error.strerror}", hint=HINT) from error
    except (ValueError, RecursionError) as error:
        hint = "the file is cut short or no JSON; measure again, or restore it"
        raise InputError(f"{file}: results are not strict JSON: {error}", hint=hint) from error


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def decoded(kind: Any, value: Any, where: str = "") -> Any:
    """What `encoded` made, as the noun, or the type of a noun's field, that it was.

    raises   _WrongError: it cannot have been that
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is object:
        return value
    if is_dataclass(kind):
        return _noun(kind, value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is UnionType:
        return None if value is None else decoded(arguments[0], value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        items = _checked(dict, value, where).items()
        return {key: decoded(arguments[1], one, f"{where}.{key}") for key, one in items}
    if origin is Literal and value not in arguments:
        raise _WrongError(f"{where} is {value!r}, none of {', '.join(arguments)}")
    return value if origin is Literal else _number(value, where) if kind is float else _checked(kind, value, where)


def _noun(kind: Any, value: Any, where: str) -> Any:
    found = _checked(dict, value, where)
    known = {}
    for name, hint in _hints(kind).items():
        place = f"{where}.{name}".lstrip(".")
        if name in found:
            known[name] = decoded(hint, found[name], place)
        elif f"{kind.__name__}.{name}" not in ADDED:
            raise _WrongError(f"{place} is not there")
    return kind(**known)


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    found = _checked(list, value, where)
    kinds = (arguments[0],) * len(found) if arguments[-1] is Ellipsis else arguments
    if len(kinds) != len(found):
        raise _WrongError(f"{where} has {len(found)} entries, not {len(kinds)}")
    return tuple(decoded(kind, one, f"{where}[{at}]") for at, (kind, one) in enumerate(zip(kinds, found, strict=True)))


def _number(value: Any, where: str) -> float:
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _WrongError(f"{where} is {value!r}, no number")
    return float(value)


def _checked(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _WrongError(f"{where or 'the whole'} is a {type(value).__name__}, not a {kind.__name__}")
    return value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)

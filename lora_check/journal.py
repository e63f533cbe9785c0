"""Finished pieces of work, written down as they come, so that a check can go on where it was stopped.

One line of JSON each, after a first line that says what is checked: the request, and a stamp of everything that the
results depend on. A journal of other inputs is refused, never mixed. Only comparisons are kept; names of mistakes
depend on all of them and are found again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import Lock
from typing import IO, Any

from lora_check.compare import Measure
from lora_check.errors import InputError, UsageError
from lora_check.first_pass import Part
from lora_check.items import PIECE_BYTES, Item, Request
from lora_check.types import Adapter, Checkpoint, Comparison, Verdict
from lora_check.versions import versions
from lora_check.work import Outcome

KIND = "lora_check journal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The first line: what is checked, and which part of it is written down here.

    stamp   of versions, options, headers, and of size and time of every file
    shard   '2/4', or '' for a whole check
    """

    request: Request
    stamp: str
    shard: str = ""


class Journal:
    """A journal that is being written; what it held before is in `done`."""

    def __init__(self, path: str, head: Head) -> None:
        self._lock = Lock()
        self.done: dict[str, Any] = {}
        line = _head_line(head)
        if os.path.exists(path) and os.path.getsize(path):
            found, results, length = read(path)
            if found != json.loads(json.dumps(_plain_head(head))):
                raise _another(path)
            self.done = results
            os.truncate(path, length)
            self._file = _opened(path)
        else:
            self._file = _opened(path)
            self._write(line)

    def add(self, item: Item, result: Any) -> None:
        """Write one result down; it survives the end of this process."""
        self._write(json.dumps({"item": item.key, **_as_json(result)}))

    def _write(self, line: str) -> None:
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


class Parts:
    """The journals of all shards of a check, read only.

    raises   InputError: one of them is of another check
    """

    def __init__(self, paths: Sequence[str], head: Head) -> None:
        self.done: dict[str, Any] = {}
        for path in paths:
            found, results, _ = read(path)
            if found["stamp"] != head.stamp:
                raise _another(path)
            self.done.update(results)

    def add(self, item: Item, result: Any) -> None:
        """What is done after all shards is not written down."""

    def close(self) -> None:
        """There is nothing to let go of."""


def read(path: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The head of a journal, its results by the keys of their items, and the bytes of its whole lines.

    raises   InputError: it cannot be read, or it is no journal
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"journal {path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    whole = raw[: raw.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    try:
        head, *found = (json.loads(line) for line in lines)
        if head.pop("kind") != KIND:
            raise ValueError(KIND)
        return head, {one["item"]: _from_json(one) for one in found}, len(whole)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no journal of a check", hint="name another file, or remove this one") from error


def request_of(paths: Sequence[str]) -> Request:
    """The request of several journals of one check.

    raises   InputError: they are of different checks
    """
    heads = [read(path)[0] for path in paths]
    for path, head in zip(paths, heads, strict=True):
        if head["stamp"] != heads[0]["stamp"]:
            message = f"{path} and {paths[0]} are of different checks: inputs, options or versions differ"
            raise InputError(message, hint="give the journals of all shards of one check, each run on the same files")
    told: dict[str, Any] = heads[0]["request"]
    lists: dict[str, Any] = {key: tuple(one) for key, one in told.items() if isinstance(one, list)}
    return Request(**{**told, **lists})


def stamp(request: Request, base: Checkpoint, adapters: Sequence[Adapter], merged: Checkpoint) -> str:
    """A digest of everything that the results of a check depend on, but for the bytes of its tensors.

    Instead of the bytes: size and time of change of every file; a remote checkpoint tells its own `stamps`.
    """
    seen = [_seen(base), *(_seen(one.checkpoint) for one in adapters), _seen(merged)]
    weights = [one.weight for one in adapters]
    told = json.dumps([asdict(request), versions(), PIECE_BYTES, weights, seen], sort_keys=True, default=repr)
    return hashlib.sha256(told.encode()).hexdigest()


def _seen(checkpoint: Checkpoint) -> list[Any]:
    metas = [(one.name, one.shape, one.stored_as) for one in checkpoint.metas().values()]
    files = [(str(path), *_of_file(Path(path))) for path in getattr(checkpoint, "files", ())]
    return [metas, files, list(getattr(checkpoint, "stamps", ())), _configs(checkpoint)]


def _configs(checkpoint: Checkpoint) -> list[Any]:
    adapter = getattr(checkpoint, "adapter_config", None)
    return [dict(checkpoint.config), dict(adapter) if adapter else None]


def _of_file(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _opened(path: str) -> IO[str]:
    try:
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"could not write {path}: {reason}", hint="name a file in an existing folder") from error


def _another(path: str) -> InputError:
    message = f"journal {path} is of another check: inputs, options or versions differ, or a file was changed since"
    return InputError(message, hint="name another file, or remove this one to check everything again")


def _plain_head(head: Head) -> dict[str, Any]:
    return {"request": asdict(head.request), "stamp": head.stamp, "shard": head.shard}


def _head_line(head: Head) -> str:
    return json.dumps({"kind": KIND, **_plain_head(head)})


# ---------------------------------------------------------------------------------------------------- results


def _as_json(result: Any) -> dict[str, Any]:
    """A result under the name of its kind; rows that want a closer look are written down as such."""
    if isinstance(result, Outcome):
        refuted = asdict(result.refuted) if result.refuted else None
        return {"outcome": _comparison_dict(result.comparison), "refuted": refuted}
    return {"part": asdict(result)} if isinstance(result, Part) else {"same": result}


def _from_json(line: Mapping[str, Any]) -> Any:
    if "outcome" in line:
        refuted = Measure(**line["refuted"]) if line["refuted"] else None
        return Outcome(_comparison(line["outcome"]), refuted)
    return Part(**line["part"]) if "part" in line else {True: True, None: None}[line["same"]]


def _comparison_dict(one: Comparison) -> dict[str, Any]:
    plain = {field.name: getattr(one, field.name) for field in fields(one)}
    return plain | {"verdict": one.verdict.value, "told": dict(one.told)}


def _comparison(told: Mapping[str, Any]) -> Comparison:
    tuples = {name: tuple(told[name]) for name in ("adapters", "shape")}
    return Comparison(**{**told, **tuples, "verdict": Verdict(told["verdict"])})

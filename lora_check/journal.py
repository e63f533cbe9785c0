"""Finished pieces of work, written down as they come, so that a check can go on where it was stopped.

One line of JSON each with a checksum, after a first line that says what is checked: the request, and the fingerprint of
everything that the results depend on. A journal of other inputs is refused, never mixed. Only comparisons are kept;
names of mistakes depend on all of them and are found again.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from threading import Lock
from typing import IO, Any

from lora_check.compare import Measure
from lora_check.errors import InputError, UsageError
from lora_check.first_pass import Part
from lora_check.items import Item, Request
from lora_check.types import Comparison, Verdict
from lora_check.work import Glimpse, Outcome

KIND = "lora_check journal"
UNLOCKABLE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems without locks answer."""
AGAIN = "name another file, or remove this one to check everything again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The first line: what is checked, and which part of it is written down here.

    stamp   the fingerprint
    shard   '2/4', or '' for a whole check
    """

    request: Request
    stamp: str
    shard: str = ""


class Journal:
    """A journal that is being written, by nobody else; what it held before is in `done`.

    raises   UsageError: it cannot be written, or somebody else writes it
             InputError: it is no journal, or one of another check
    """

    def __init__(self, path: str, head: Head) -> None:
        self.path, self._writing = path, Lock()
        self.done: dict[str, Any] = {}
        self._file = _opened(path)
        try:
            _lock(self._file, path)
            self._go_on(head)
        except BaseException:
            self.close()
            raise

    def _go_on(self, head: Head) -> None:
        line = _line({"kind": KIND, "request": asdict(head.request), "stamp": head.stamp, "shard": head.shard})
        self._file.seek(0)
        start = self._file.read(len(line))
        if len(start) < len(line) and line.startswith(start):  # stopped while it began
            self._cut(0)
            self._write(line)
            return
        self.done, length = _results(self._file, self.path, head.stamp)
        other = _head(self._file, self.path)["shard"]
        if other != head.shard:
            mine, theirs = (f"shard {one}" if one else "a whole check" for one in (head.shard, other))
            raise InputError(f"{self.path} is the journal of {theirs}, not of {mine}", hint="give each its own journal")
        self._cut(length)

    def add(self, item: Item, result: Any) -> None:
        """Write one result down; it survives the end of this process."""
        self._write(_line({"item": item.key, **_as_json(result)}))

    def _cut(self, length: int) -> None:
        """Drop what follows the last whole line."""
        with _told_of(self.path):
            os.ftruncate(self._file.fileno(), length)

    def _write(self, line: bytes) -> None:
        with self._writing, _told_of(self.path):
            left = memoryview(line)
            while left:
                left = left[os.write(self._file.fileno(), left) :]

    def close(self) -> None:
        """Let go of the file, and of its lock."""
        self._file.close()


class Parts:
    """The journals of all shards of a check, read only.

    raises   InputError: one of them cannot be read, is no journal, or is one of another check
    """

    def __init__(self, paths: Sequence[str], head: Head) -> None:
        self.done: dict[str, Any] = {}
        for path in paths:
            with _reading(path) as file:
                self.done.update(_results(file, path, head.stamp)[0])

    def add(self, item: Item, result: Any) -> None:
        """What is done after all shards is not written down."""

    def close(self) -> None:
        """There is nothing to let go of."""


def heads_of(paths: Sequence[str]) -> list[dict[str, Any]]:
    """The first lines of several journals of one check.

    raises   InputError: one of them cannot be read or is no journal, or they are of different checks
    """
    heads = []
    for path in paths:
        with _reading(path) as file:
            heads.append(_head(file, path))
        if heads[-1]["stamp"] != heads[0]["stamp"]:
            message = f"{path} and {paths[0]} are of different checks: inputs, options or versions differ"
            raise InputError(message, hint="give the journals of all shards of one check, each run on the same files")
    return heads


def request_of(paths: Sequence[str]) -> Request:
    """The request of several journals of one check."""
    told: dict[str, Any] = heads_of(paths)[0]["request"]
    lists: dict[str, Any] = {key: tuple(one) for key, one in told.items() if isinstance(one, list)}
    return Request(**{**told, **lists})


# ------------------------------------------------------------------------------------------------------- the file


def _opened(path: str) -> IO[bytes]:
    """The file for reading and appending; made, if it is not there."""
    with _told_of(path):
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"could not write {path}: it is no file", hint="name a file in an existing folder")
        return open(path, "a+b", buffering=0)  # the journal closes it


def _lock(file: IO[bytes], path: str) -> None:
    """Keep others from writing the file for as long as it is open; where the file system knows no locks, nothing."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        hint = "wait for it, or give this one a journal of its own"
        raise UsageError(f"journal {path} is being written by another check", hint=hint) from None
    except OSError as error:
        if error.errno not in UNLOCKABLE:
            raise UsageError(f"journal {path} cannot be locked: {_reason(error)}", hint=AGAIN) from error


@contextmanager
def _reading(path: str) -> Iterator[IO[bytes]]:
    """The file for reading."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"journal {path} cannot be read: {_reason(error)}") from error


@contextmanager
def _told_of(path: str) -> Iterator[None]:
    """Turn an error of the system into a sentence about the file."""
    try:
        yield
    except OSError as error:
        message = f"could not write {path}: {_reason(error)}"
        raise UsageError(message, hint="name a file in an existing folder, with room on its disk") from error


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _another(path: str) -> InputError:
    message = f"journal {path} is of another check: inputs, options or versions differ, or a file was changed since"
    return InputError(message, hint=AGAIN)


# ------------------------------------------------------------------------------------------------------ its lines


def _head(file: IO[bytes], path: str) -> dict[str, Any]:
    """What the first line says."""
    _, head = next(_lines(file, path), (0, {}))
    if head.keys() != {"kind", *(one.name for one in fields(Head))} or head["kind"] != KIND:
        raise InputError(f"{path} is no journal of a check", hint="name another file")
    return head


def _results(file: IO[bytes], path: str, stamp: str) -> tuple[dict[str, Any], int]:
    """The results of a journal with that stamp, by the keys of their items; and the bytes of its whole lines."""
    if _head(file, path)["stamp"] != stamp:
        raise _another(path)
    lines, results = _lines(file, path), {}
    length, _ = next(lines)
    for end, one in lines:
        results[one["item"]], length = _from_json(one), end
    return results, length


def _lines(file: IO[bytes], path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """For each line where it ends, and what it says; the last one is left out where it was cut short."""
    length = 0
    with open(os.dup(file.fileno()), "rb") as buffered:
        buffered.seek(0)
        for number, line in enumerate(buffered, start=1):
            if not line.endswith(b"\n"):
                return
            length += len(line)
            yield length, _checked(line, number, path)


def _line(told: Mapping[str, Any]) -> bytes:
    """A line of JSON, whose last entry is a checksum of the others."""
    text = json.dumps(told)[:-1]
    return f'{text}, "sum": "{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def _checked(line: bytes, number: int, path: str) -> dict[str, Any]:
    text, _, told = line.rpartition(b', "sum": "')
    if told != b'%08x"}\n' % zlib.crc32(text):
        problem = f"journal {path} is damaged in line {number}" if number > 1 else f"{path} is no journal of a check"
        raise InputError(problem, hint=AGAIN if number > 1 else "name another file")
    found: dict[str, Any] = json.loads(text + b"}")
    return found


def _as_json(result: Any) -> dict[str, Any]:
    """A result under the name of its kind; rows that want a closer look are written down as such."""
    if isinstance(result, Outcome):
        refuted = asdict(result.refuted) if result.refuted else None
        return {"outcome": _comparison_dict(result.comparison), "refuted": refuted}
    if isinstance(result, Glimpse):
        return {"part": asdict(result.part), "arithmetic": result.arithmetic}
    return {"same": result}


def _from_json(line: Mapping[str, Any]) -> Any:
    if "outcome" in line:
        refuted = Measure(**line["refuted"]) if line["refuted"] else None
        return Outcome(_comparison(line["outcome"]), refuted)
    if "part" in line:
        return Glimpse(Part(**line["part"]), line["arithmetic"])
    return {True: True, None: None}[line["same"]]


def _comparison_dict(one: Comparison) -> dict[str, Any]:
    plain = {field.name: getattr(one, field.name) for field in fields(one)}
    return plain | {"verdict": one.verdict.value, "told": dict(one.told)}


def _comparison(told: Mapping[str, Any]) -> Comparison:
    tuples = {name: tuple(told[name]) for name in ("adapters", "shape")}
    return Comparison(**{**told, **tuples, "verdict": Verdict(told["verdict"])})

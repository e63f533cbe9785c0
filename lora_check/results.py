"""A file of records, one JSON object a line, that a batch goes on with after it was stopped.

The records of an earlier run are put aside, and those that still hold come back in their turn. So at every moment the
file holds, in the order of the batch, what this run found or found still true, and nothing else; a batch that is killed
leaves at most a part of one record more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lora_check.errors import InputError, UsageError
from lora_check.types import Verdict

CANNOT = 2
"""The exit code of what could not be checked."""

Record = dict[str, Any]
BEGINNING = b'{"schema": '
"""How every record begins, and so what a part of one looks like."""


class Results:
    """The records of a batch, in a file; `known` finds those of earlier runs. Nothing is written before `begin`.

    raises   InputError: the file is there and holds anything else; it is left as it is
             UsageError: it cannot be read or written
    """

    def __init__(self, path: str) -> None:
        self._path = Path(os.path.realpath(path))
        self._aside = self._path.with_name(f".{self._path.name}.before")
        self._known: dict[str, tuple[int, int]] = {}
        self._file: IO[bytes] | None = None
        self._before: IO[bytes] | None = None
        with self._told():
            if self._path.exists() and not self._path.is_file():
                raise UsageError(f"{path} is no regular file", hint="leave --output out: the records go to stdout")
            _spans(self._path)

    def begin(self) -> None:
        """Put the records of earlier runs aside, and begin.

        raises   UsageError: it cannot be written
        """
        with self._told():
            if self._path.exists():
                _append(self._aside, self._path)
                self._known = _spans(self._aside)
                self._before = self._aside.open("rb")
            else:
                self._aside.unlink(missing_ok=True)
            self._file = self._path.open("wb")

    def known(self, stamp: str) -> Record | None:
        """The record that carries this stamp, if there is one."""
        found = self._known.get(stamp)
        if found is None:
            return None
        assert self._before is not None, "begin comes first"
        self._before.seek(found[0])
        return dict(json.loads(self._before.read(found[1] - found[0])))

    def add(self, record: Record) -> None:
        """Write a record behind the others; it survives the end of this process.

        raises   UsageError: it cannot be written
        """
        assert self._file is not None, "begin comes first"
        with self._told():
            self._file.write(as_line(record))
            self._file.flush()

    def finish(self) -> None:
        """Every record is there: what earlier runs left is of no use any more."""
        with self._told():
            self._aside.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the files; before `finish`, a later run goes on from here."""
        for file in (self._file, self._before):
            if file is not None:
                file.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Let the operating system's refusal be a sentence."""
        try:
            yield
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            message = f"could not write {self._path}: {reason}"
            raise UsageError(message, hint="name a file in an existing folder") from error


def as_line(record: Record) -> bytes:
    """The record as a line of JSON."""
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _append(older: Path, newer: Path) -> None:
    """Put the whole records of one file behind those of another, of which a part of a record is cut off."""
    spans = _spans(older)
    with older.open("r+b" if older.exists() else "x+b") as into, newer.open("rb") as source:
        into.truncate(into.seek(max((end for _, end in spans.values()), default=0)))
        into.writelines(raw for raw in source if raw.endswith(b"\n"))


def _spans(path: Path) -> dict[str, tuple[int, int]]:
    """Stamp -> where its last record begins and ends, of those that have one; empty where no file is.

    raises   InputError: it holds anything but records, and at its end a part of one
    """
    found: dict[str, tuple[int, int]] = {}
    begin = 0
    with path.open("rb") if path.exists() else open(os.devnull, "rb") as file:
        for raw in file:
            stamp = _stamp_of(raw)
            if stamp is None:
                message = f"{path} is there already, and holds no records of a batch"
                raise InputError(message, hint="name another file, or remove this one")
            if stamp:
                found[stamp] = begin, begin + len(raw)
            begin += len(raw)
    return found


def _stamp_of(raw: bytes) -> str | None:
    """The stamp of a record, '' of one without, or of the part of one that ends a file; None: it is no record."""
    if not raw.endswith(b"\n"):
        return "" if raw.startswith(BEGINNING[: len(raw)]) else None
    try:
        record = json.loads(raw)
        code = CANNOT if "error" in record else Verdict(record["verdict"]).exit_code
        ours = isinstance(record["line"], int) and record["exit_code"] == code
        return str(record.get("stamp", "")) if ours else None
    except (ValueError, KeyError, TypeError):
        return None

"""Many merges, one after the other in one process: each is checked as if it were alone, and its result is a record.

Lines that name one base and stand close together read its headers once. A record carries a stamp of all that it depends
on, so that whoever kept the records of an earlier run can tell which of them still hold.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from lora_check import registry
from lora_check.errors import LoraCheckError
from lora_check.fingerprint import plain, programs
from lora_check.inputs import Opened, opened_inputs
from lora_check.items import Request
from lora_check.locations import Located, open_checkpoint
from lora_check.manifest import Line
from lora_check.means import Means, refuse_what_cannot_be
from lora_check.pipeline import checked_open, listed
from lora_check.reading.plain import reading
from lora_check.report import SCHEMA, Report
from lora_check.results import CANNOT, Record
from lora_check.types import Checkpoint

OPEN_BASES = 2
"""How many bases stay open: enough for lines that take turns, and headers of no more models are held in memory."""

Known = Callable[[str], Record | None]
"""A stamp -> the record of an earlier run that carries it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What holds for every line, as `pipeline.check` has it."""

    means: Means
    device: str = "cpu"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


def check_all(lines: Sequence[Line], common: Common, known: Known = lambda _: None) -> Iterator[Record]:
    """Check every line, in their order; what cannot be checked has a record of its error, and the others go on.

    raises   UsageError: the options cannot be met for any line
    """
    for line in lines[:1]:
        refuse_what_cannot_be(_request(line, common), common.means)
    return _records(lines, common, known)


def _records(lines: Sequence[Line], common: Common, known: Known) -> Iterator[Record]:
    engine = registry.load("engines")[common.means.engine]
    common = replace(common, means=replace(common.means, lasting=True))
    with closing(Bases()) as bases, closing(engine):
        batch = _Batch(common=common, known=known, bases=bases, tools=programs())
        yield from map(batch.record, lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """What the lines share; `tools`: the versions of all that computes."""

    common: Common
    known: Known
    bases: Bases
    tools: Mapping[str, str]

    def record(self, line: Line) -> Record:
        """The record of a line, whatever happens; a mistake in this package stops one line and not the others."""
        try:
            return self.checked(line)
        except LoraCheckError as error:
            return _failed(line, error.code, error.message, error.hint)
        except Exception as error:  # noqa: BLE001
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return _failed(line, "crash", message, "check this line alone: its traceback says where")

    def checked(self, line: Line) -> Record:
        """Open, see whether it was checked before, check.

        raises   LoraCheckError: an input cannot be read
        """
        began, common = time.monotonic(), self.common
        request = _request(line, common)
        given = request.base, request.adapters, request.merged, request.weights, request.combination
        with (
            reading(common.means.read),
            opened_inputs(*given, base_file=self.bases.opened(line.base)) as opened,
        ):
            told = [self.tools, plain(request.anchored()), line.id, common.select, common.ignore]
            stamp = _digest([SCHEMA, *told, *map(_lying, _files(opened))])
            if (found := self.known(stamp)) is not None:
                return {**found, "line": line.number}
            report = checked_open(request, common.means, opened, began)
        return _done(line, listed(report, common.select, common.ignore), stamp)


def _request(line: Line, common: Common) -> Request:
    return Request(
        base=line.base,
        adapters=line.adapters,
        merged=line.merged,
        weights=line.weights,
        combination=line.combination,
        include=common.include,
        exclude=common.exclude,
        device=common.device,
    )


# ---------------------------------------------------------------------------------------------------- records


def _done(line: Line, report: Report, stamp: str) -> Record:
    """The record of a check: of the report all but its list of tensors."""
    told = report.as_dict()
    kept = ("verdict", "exit_code", "summary", "findings", "findings_withheld")
    return {**_head(line), **{key: told[key] for key in kept}, "stamp": stamp}


def _failed(line: Line, code: str, message: str, hint: str) -> Record:
    """The record of an error; it has no stamp, for the line has to be tried again."""
    error = {"code": code, "message": message, "hint": hint}
    return {**_head(line), "exit_code": CANNOT, "error": error}


def _head(line: Line) -> Record:
    return {"schema": SCHEMA, "line": line.number, "id": line.id, "inputs": line.inputs}


# ------------------------------------------------------------------------------------ what a record depends on


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _files(opened: Opened) -> Iterator[Checkpoint]:
    """Every checkpoint that was opened, those of combined adapters too."""
    yield opened.base
    for adapter in opened.adapters:
        yield from (one.checkpoint for one in adapter.members or (adapter,))
    yield opened.merged


def _lying(checkpoint: Any) -> list[tuple[str, int, int, int]]:
    """What a check of it depends on, in the place of its bytes: (name, size, times of change) of every file.

    Of a folder all its files, for findings tell of what lies beside the tensors; of a file, the JSON beside it too.
    """
    while not hasattr(checkpoint, "folder") and hasattr(checkpoint, "inner"):
        checkpoint = checkpoint.inner
    folder, files = getattr(checkpoint, "folder", None), tuple(getattr(checkpoint, "files", ()))
    beside = folder.iterdir() if folder else files[0].parent.glob("*.json")
    found = {str(path): path.stat() for path in (*files, *beside) if path.is_file()}
    return [(name, one.st_size, one.st_mtime_ns, getattr(one, "st_ctime_ns", 0)) for name, one in sorted(found.items())]


# ------------------------------------------------------------------------------------------------------ bases


class Bases:
    """The bases that were opened last, open still: a few, and none of which a file was changed since."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, tuple[Located, Any]] = OrderedDict()

    def opened(self, location: str) -> Checkpoint:
        """The base at a location, headers read.

        raises   InputError: it cannot be read
        """
        base, before = self._open.pop(location, (None, None))
        if base is not None and not _unchanged(base, before):
            base.close()
            base = None
        if base is None:
            while len(self._open) >= OPEN_BASES:
                self._open.popitem(last=False)[1][0].close()
            base = open_checkpoint(location, role="base")
            before = _lying(base)
        self._open[location] = base, before
        return base

    def close(self) -> None:
        """Let go of all of them."""
        while self._open:
            self._open.popitem()[1][0].close()


def _unchanged(base: Located, before: Any) -> bool:
    try:
        return bool(_lying(base) == before)
    except OSError:  # opening it anew tells what is wrong
        return False

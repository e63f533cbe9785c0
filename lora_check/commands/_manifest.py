"""report --manifest: many merges in one process, one line of JSON each, and a table of what became of them."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from lora_check import registry
from lora_check.commands import _arguments as arguments
from lora_check.commands import _output as output
from lora_check.errors import UsageError

if TYPE_CHECKING:
    from lora_check.manifest import Line

SHOWN = 20
"""Lines that are told of one by one."""

WORDS = {0: "verified", 1: "refuted", 3: "inconclusive", 2: "could not check"}
WORST_FIRST = (2, 1, 3, 0)
ONE_REPORT = ("weights", "combination", "candidate_base", "candidate_adapter", "journal", "shard", "all")
"""Options of one check: a manifest has them on its lines, or not at all."""


def run(args: Namespace) -> int:
    """Check every line of the manifest; the exit code of the worst."""
    _refuse_one_report(args)
    from lora_check import manifest

    lines = manifest.read(args.manifest)
    if args.output is not None:
        inputs = chain.from_iterable((line.base, *line.adapters, line.merged) for line in lines)
        output.demand_writable(args.output, [args.manifest, *inputs])
    tally = _Tally()
    for record in _records(lines, args):
        tally.add(record)
    table = tally.as_text()
    if args.output is not None:
        output.say(table)
    else:
        output.complain(table)
    return tally.exit_code


def _refuse_one_report(args: Namespace) -> None:
    """Raise UsageError for what only one report can have."""
    files = [name for name in registry.load("renderers") if name != "text"]
    given = [name for name in (*ONE_REPORT, *files) if getattr(args, name)]
    if args.locations:
        raise UsageError(
            f"--manifest {args.manifest} and locations are both given: {', '.join(args.locations)}",
            hint="name the merges in the manifest, or one of them on the command line",
        )
    if given or args.format != "text":
        option = f"--{given[0].replace('_', '-')}" if given else f"--format {args.format}"
        hint = "a manifest has weights and combination on its lines, and its results are lines of JSON: --output FILE"
        raise UsageError(f"{option} goes with one report, not with --manifest", hint=hint)


def _records(lines: Sequence[Line], args: Namespace) -> Iterator[dict[str, Any]]:
    """The record of each line, written to where it belongs."""
    from lora_check.batch import Common, check_all
    from lora_check.means import Means
    from lora_check.results import Results, as_line

    options = arguments.filters(args)
    means = Means(jobs=options.pop("jobs"), engine=options.pop("engine"), read=options.pop("read"))
    common = Common(means=means, device=args.device, **options)
    if args.output is None:
        for record in _watched(check_all(lines, common), len(lines)):
            output.say(as_line(record).decode())
            yield record
        return
    results = Results(args.output)
    records = check_all(lines, common, results.known)
    with closing(results):
        results.begin()
        for record in _watched(records, len(lines)):
            results.add(record)
            yield record
        results.finish()


def _watched(records: Iterable[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """The same, with a bar on stderr when someone watches it and nothing else is written there."""
    from tqdm import tqdm

    alone = sys.stderr.isatty() and not sys.stdout.isatty()
    yield from tqdm(records, total=count, unit="line", leave=False, file=sys.stderr, disable=not alone)


class _Tally:
    """What became of the lines, counted; the first that are not verified are kept for the table."""

    def __init__(self) -> None:
        self._codes: Counter[int] = Counter()
        self._told: list[tuple[str, str, str, str]] = []

    def add(self, record: dict[str, Any]) -> None:
        """Count one record."""
        code = record["exit_code"]
        self._codes[code] += 1
        if code and len(self._told) < SHOWN:
            self._told.append(_row(record))

    @property
    def exit_code(self) -> int:
        """2 if any line could not be checked, else 1 if any is refuted, else 3 if any is inconclusive, else 0."""
        return next(code for code in WORST_FIRST if self._codes[code])

    def as_text(self) -> str:
        """A table of the lines that are not verified, and how many there are of each kind."""
        more = sum(self._codes.values()) - self._codes[0] - len(self._told)
        rows = tabulate(self._told, headers=("line", "id", "verdict", "why"), disable_numparse=True)
        blocks = [*([rows] if self._told else []), *([f"and {more} lines more"] if more else [])]
        counts = ", ".join(f"{self._codes[code]} {WORDS[code]}" for code in WORDS if self._codes[code])
        return "\n".join([*blocks, *([""] if blocks else []), f"{sum(self._codes.values())} lines: {counts}"]) + "\n"


def _row(record: dict[str, Any]) -> tuple[str, str, str, str]:
    """Line, id, what came out, and why: the codes of findings, or the error."""
    told = "" if record["id"] is None else output.printable(str(record["id"]))
    codes = dict.fromkeys(one["code"] for one in record.get("findings", ()) if one["severity"] != "info")
    why = record["error"]["message"] if "error" in record else ", ".join(codes)
    return str(record["line"]), told, WORDS[record["exit_code"]], output.printable(why)

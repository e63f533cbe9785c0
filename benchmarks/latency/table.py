"""Results -> tables: overhead over tokens, a block for everything else; and all figures of one cell.

A table is heads, rows and notes; `text` sets it for a terminal, `markdown` for a page. What has no figure has a mark
that a note below explains: nothing is left out. Seconds of different clocks never share a column.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import isfinite
from typing import TYPE_CHECKING, TypeAlias

from tabulate import tabulate

from benchmarks.latency.figures import Figures, overhead, spread, summary
from benchmarks.latency.nouns import Cell, Measured, Results, Row

if TYPE_CHECKING:
    from benchmarks.latency.verdicts import Judgement

Judged: TypeAlias = "Mapping[tuple[str, bool, str], Judgement]"
"""(backend, again, clock) -> what `verdicts` says of it."""

WIDTH = 120
COLUMNS = 7
"""Of tokens, in one table of WIDTH characters."""
CLOCKS = ("graph_replay", "device_busy", "eager_wall")
"""As they are preferred for the one column that the main table has room for: what a server pays, first."""
AGAIN = "merged again (A/A)"
NOTHING = "-"
MARKS = {"invalid": "!", "noisy": "~"}
UNITS = ((1e-3, "us", 1e6), (1.0, "ms", 1e3), (float("inf"), "s", 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with its title; notes explain marks like [1]."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Notes:
    """Reasons, each told once."""

    told: list[str] = field(default_factory=list)

    def mark(self, reason: str) -> str:
        """The mark that stands for a reason."""
        if reason not in self.told:
            self.told.append(reason)
        return f"[{self.told.index(reason) + 1}]"

    def lines(self) -> tuple[str, ...]:
        """What the marks mean."""
        return tuple(f"[{at}] {reason}" for at, reason in enumerate(self.told, 1))


# --------------------------------------------------------------------------------------------------------- the faces


def text(table: Table) -> str:
    """For a terminal, WIDTH columns at most."""
    align = ("left", *["right"] * (len(table.heads) - 1))
    body = tabulate(table.rows, table.heads, tablefmt="simple", disable_numparse=True, colalign=align)
    return "\n".join([*wrapped([table.title]), "", body, *wrapped(table.notes)])


def markdown(table: Table) -> str:
    """For a page, without the title."""
    align = ("left", *["right"] * (len(table.heads) - 1))
    body = tabulate(table.rows, table.heads, tablefmt="github", disable_numparse=True, colalign=align)
    notes = "\n".join(f"- {line}" for line in wrapped(table.notes, "  "))
    return f"{body}\n\n{notes}" if notes else body


def wrapped(lines: Iterable[str], indent: str = "    ") -> list[str]:
    """Lines of WIDTH characters at most, those that go on indented."""
    return [textwrap.fill(line, WIDTH - 2, subsequent_indent=indent, break_long_words=False) for line in lines]


# ---------------------------------------------------------------------------------------------------------- the words


def seconds(value: float, unit: tuple[str, float] | None = None) -> str:
    """Three digits in a unit, or with the unit that fits."""
    name, factor = unit or unit_of(value)
    return figure(value * factor) if unit else f"{figure(value * factor)} {name}"


def unit_of(value: float) -> tuple[str, float]:
    """Name and factor of the unit that gives a figure between 1 and 1000."""
    return next((name, factor) for limit, name, factor in UNITS if abs(value) < limit)


def figure(value: float) -> str:
    """Three digits or so."""
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}" if isfinite(value) else str(value)


def percent(share: float) -> str:
    """A share in percent, with its sign and without the percent sign."""
    value = round(100 * share, 1 if abs(share) < 0.9995 else None) + 0.0 if isfinite(share) else share
    return f"{value:+.{1 if abs(value) < 100 else 0}f}"


def apart(share: float | None) -> str:
    """Half the width of an A/A, in percent."""
    return "" if share is None else f"±{100 * share:.1f}"


def ranged(one: Figures, unit: tuple[str, float]) -> str:
    """Median (p20-p80)."""
    return f"{seconds(one.median, unit)} ({seconds(one.p20, unit)}-{seconds(one.p80, unit)})"


def targets(cell: Cell) -> str:
    """`7 targets`, or their names where they are few."""
    names = [name.removesuffix("_proj") for name in cell.targets]
    return f"{len(names)} targets" if len(names) > 3 else ",".join(names)


def group(cell: Cell) -> tuple[str, ...]:
    """What one block of the main table has in common."""
    kind = (cell.workload, cell.shape, cell.rank, cell.targets, cell.adapters, cell.context, cell.dtype, cell.cache)
    return tuple(map(str, kind))


def heading(cell: Cell) -> str:
    """A block in words."""
    several = f"{cell.adapters} adapters" if cell.adapters > 1 else ""
    context = f"after {cell.context} tokens" if cell.context else ""
    parts = [f"{cell.workload} {cell.shape}", targets(cell), f"r = {cell.rank}", several, context, cell.dtype]
    return ", ".join([*(part for part in parts if part), cell.cache])


def column(cell: Cell) -> str:
    """Tokens: one number where one factor is 1, else sequences x new tokens of each."""
    if cell.batch > 1 and cell.length > 1:
        return f"{cell.batch}x{cell.length}"
    return f"{cell.tokens}" if cell.length > 1 or cell.tokens == 1 else f"{cell.batch}x1"


def label(cell: Cell) -> str:
    """A cell in words."""
    return f"{heading(cell)}, T = {column(cell)}"


def clock_of(results: Iterable[Measured], wanted: str = "") -> str:
    """The wanted clock, or the first of CLOCKS by which anything was timed; empty if nothing was."""
    timed = {clock for one in results for row in one.rows for clock, timing in row.clocks.items() if timing.samples}
    return wanted or next((clock for clock in (*CLOCKS, *sorted(timed)) if clock in timed), "")


def clocks_of(rows: Iterable[Row]) -> list[str]:
    """All clocks that rows have a word of, the known ones first."""
    seen = {clock for row in rows for clock in row.clocks}
    return [*(clock for clock in CLOCKS if clock in seen), *sorted(seen - set(CLOCKS))]


def yardstick(measured: Measured) -> Row | None:
    """The row of merged."""
    return next((row for row in measured.rows if row.merged and not row.again), None)


def untimed(row: Row, clock: str) -> str:
    """Why a row has no time by a clock, in words; empty if it has one."""
    if row.missing:
        return row.missing
    if row.gate is None:
        return f"{row.backend}: its output was never checked"
    if row.gate.wrong:
        return f"wrong: {row.gate.wrong}"
    timing = row.clocks.get(clock)
    if timing is None:
        return f"{row.backend}: not timed by {clock}"
    return "" if timing.samples else timing.missing or f"{row.backend}: no samples by {clock}"


# --------------------------------------------------------------------------------------------------- the main table


def overview(
    results: Iterable[Measured], clock: str, judge: Callable[[Measured], Judged] = lambda _: {}
) -> list[Table]:
    """A block for everything but tokens, which are the columns: merged in seconds, all others in percent over it."""
    return [block(several, clock, judge) for several in blocks(results)]


def blocks(results: Iterable[Measured]) -> list[Sequence[Measured]]:
    """Cells that are alike but for their tokens, by tokens, no more than a table has room for."""
    found: dict[tuple[str, ...], list[Measured]] = {}
    for one in results:
        found.setdefault(group(one.cell), []).append(one)
    ordered = (sorted(several, key=lambda one: (one.cell.tokens, one.cell.length)) for several in found.values())
    return [several[at : at + COLUMNS] for several in ordered for at in range(0, len(several), COLUMNS)]


def block(several: Sequence[Measured], clock: str, judge: Callable[[Measured], Judged]) -> Table:
    """One block: a row for each backend, in the order in which they were measured."""
    notes = Notes()
    names = list(dict.fromkeys(key(row) for one in several for row in one.rows))
    judged = [judge(one) for one in several]
    rows = [
        (named(name), *(entry(one, name, clock, said, notes) for one, said in zip(several, judged, strict=True)))
        for name in names
    ]
    heads = (f"{clock}, % over merged ±A/A", *(f"T = {column(one.cell)}" for one in several))
    return Table(title=heading(several[0].cell), heads=heads, rows=tuple(rows), notes=notes.lines())


def key(row: Row) -> tuple[str, bool]:
    """What tells the rows of a cell apart."""
    return row.backend, row.again


def named(name: tuple[str, bool]) -> str:
    """A row's name."""
    return AGAIN if name[1] else name[0]


def entry(measured: Measured, name: tuple[str, bool], clock: str, judged: Judged, notes: Notes) -> str:
    """Seconds of merged; of others the overhead, with the A/A of the cell, and a mark if it is invalid or noisy."""
    row = next((row for row in measured.rows if key(row) == name), None)
    if row is None:
        return notes.mark("merged was not timed here" if name[1] else "not asked for in this cell")
    if reason := untimed(row, clock):
        return notes.mark(reason)
    said = judged.get((*name, clock))
    mark = MARKS.get(said.word, "") if said else ""
    if mark == MARKS["invalid"] and said:
        mark += notes.mark(said.reason)
    if row.merged and not row.again:
        return seconds(summary(row.clocks[clock]).median) + mark
    over = overhead(row, yardstick(measured), clock)
    if over is None:
        return notes.mark("merged has no time to be compared with")
    return f"{percent(over.median)} {apart(spread(measured, clock))}".strip() + mark


# ------------------------------------------------------------------------------------------------------ one cell


def detail(measured: Measured, judged: Judged) -> list[Table]:
    """All figures of one cell: the times with what was checked of them, and what they are beside their floors."""
    return [times(measured), verdicts(measured, judged)]


def times(measured: Measured) -> Table:
    """Median (p20-p80) by every clock, kernels, share of launches, error over budget."""
    notes = Notes()
    clocks = clocks_of(measured.rows)
    found = [summary(t).median for row in measured.rows for t in row.clocks.values() if t.samples]
    unit = unit_of(min(found)) if found else ("us", 1e6)
    rows = [(named(key(row)), row.adapter, *shown(row, clocks, unit, notes), *checked(row)) for row in measured.rows]
    heads = ("", "adapter", *(f"{clock}, {unit[0]}" for clock in clocks), "n", "kernels", "error", "=")
    about = "median (p20-p80); n: samples; error: the largest share of its budget; =: the very bits of merged"
    return Table(title=label(measured.cell), heads=heads, rows=tuple(rows), notes=(about, *notes.lines()))


def shown(row: Row, clocks: Sequence[str], unit: tuple[str, float], notes: Notes) -> list[str]:
    """A row's times, its samples, its kernels."""
    reasons = {clock: untimed(row, clock) for clock in clocks}
    cells = [
        notes.mark(reasons[clock]) if reasons[clock] else ranged(summary(row.clocks[clock]), unit) for clock in clocks
    ]
    counts = [len(row.clocks[clock].samples) for clock in clocks if not reasons[clock]]
    many = "-".join(str(count) for count in dict.fromkeys((min(counts), max(counts)))) if counts else "0"
    return [*cells, many, NOTHING if row.kernels is None else str(row.kernels)]


def checked(row: Row) -> list[str]:
    """What the gate found."""
    if row.gate is None:
        return [NOTHING, NOTHING]
    return [f"{row.gate.share:.2g}", "yes" if row.gate.bitwise else "no"]


def verdicts(measured: Measured, judged: Judged) -> Table:
    """Each time beside its floor: overhead, share of launches, gap, share of the peak, verdict."""
    timed = [(row, clock) for row in measured.rows for clock in clocks_of([row]) if not untimed(row, clock)]
    notes = Notes()
    rows = []
    for name, several in groupby(timed, key=lambda one: key(one[0])):
        for at, (row, clock) in enumerate(several):
            said = judged.get((*name, clock))
            rows.append(("" if at else named(name), clock, *beside(measured, row, clock, said, notes)))
    heads = ("", "clock", "% over merged", "A/A", "launches %", "floor", "over floor %", "peak %", "verdict")
    return Table(title="beside the floors", heads=heads, rows=tuple(rows), notes=notes.lines())


def beside(measured: Measured, row: Row, clock: str, said: Judgement | None, notes: Notes) -> list[str]:
    """One time beside its floor."""
    over = None if row.merged and not row.again else overhead(row, yardstick(measured), clock)
    found = [NOTHING if over is None else percent(over.median), apart(spread(measured, clock)) or NOTHING]
    if said is None:
        return [*found, *[NOTHING] * 4, "not judged"]
    waiting = NOTHING if said.launches is None else f"{100 * said.launches:.0f}"
    gap = percent(summary(row.clocks[clock]).median / said.floor - 1) if said.floor else NOTHING
    floor = seconds(said.floor) if said.floor else NOTHING
    word = f"{said.word} {notes.mark(said.reason)}" if said.reason else said.word
    return [*found, waiting, floor, gap, f"{100 * said.share:.0f}", word]


def counted(results: Results, judge: Callable[[Measured], Judged]) -> dict[str, int]:
    """How many times got each verdict."""
    words = [said.word for one in results for said in judge(one).values()]
    return {word: words.count(word) for word in sorted(set(words))}

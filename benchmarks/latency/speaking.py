"""Which cells speak for a run: a View is a cell, what was judged of it, and one clock.

Whole models are asked first, else blocks, else modules; of each shape the cell that a reader would expect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, log

from benchmarks.latency.figures import summary
from benchmarks.latency.nouns import Cell, Measured, Phase, Results, Row
from benchmarks.latency.traffic import width
from benchmarks.latency.verdicts import BUSY, WALL, Judgement, Key, judged

GRAPH = "graph_replay"
LEVELS = ("model", "block", "linear")
"""Workloads, as they are preferred for an answer."""
RANK, PROMPT = 16, 2048
"""Of the cell that speaks for a shape: the nearest that there is."""


@dataclass(frozen=True, slots=True)
class Run:
    """Results, and what was judged of each of their cells."""

    results: Results
    judged: tuple[Mapping[Key, Judgement], ...]


def judge(results: Results) -> Run:
    """Every cell judged once."""
    return Run(results, tuple(judged(one, results.ceilings) for one in results))


@dataclass(frozen=True, slots=True)
class View:
    """A cell with what was judged of it, by one clock."""

    measured: Measured
    judged: Mapping[Key, Judgement]
    clock: str

    @property
    def cell(self) -> Cell:
        """What was run."""
        return self.measured.cell

    @property
    def merged(self) -> Row:
        """The yardstick."""
        return next(row for row in self.measured.rows if row.merged and not row.again)

    @property
    def seconds(self) -> float:
        """Of the yardstick."""
        return summary(self.merged.clocks[self.clock]).median

    def unmerged(self) -> list[Row]:
        """Every other backend that has a time by this clock."""
        return [row for row in self.measured.rows if not row.merged and self.said(row) is not None]

    def row(self, name: str) -> Row | None:
        """A backend that has a time that may be used."""
        return next((row for row in self.unmerged() if row.backend == name and self.valid(row)), None)

    def said(self, row: Row) -> Judgement | None:
        """What was judged of a row, if it has a time."""
        return self.judged.get((row.backend, row.again, self.clock))

    @property
    def spread(self) -> float:
        """Of the A/A; infinite where it is not known: no difference can be told from none."""
        said = self.said(self.merged)
        return inf if said is None or said.spread is None else said.spread

    @property
    def weights(self) -> int:
        """Bytes of the adapted weights."""
        return sum(outputs * inputs for outputs, inputs in self.measured.modules) * width(self.cell.dtype)

    def valid(self, row: Row) -> bool:
        """It has a time that may be used."""
        said = self.said(row)
        return said is not None and said.word != "invalid"


def clocks(run: Run) -> tuple[str, ...]:
    """The device at its own pace and the eager loop; without graphs, the seconds that the processor was busy."""
    seen = {clock for found in run.judged for _, _, clock in found}
    wanted = (GRAPH, WALL) if GRAPH in seen else (BUSY,) if BUSY in seen else (WALL,)
    return tuple(clock for clock in wanted if clock in seen)


def views(run: Run, clock: str) -> Iterator[View]:
    """Cells whose yardstick has a valid time by a clock."""
    for one, found in zip(run.results, run.judged, strict=True):
        view = View(one, found, clock)
        yardsticks = [row for row in one.rows if row.merged and not row.again]
        if yardsticks and view.valid(yardsticks[0]):
            yield view


def speaking(run: Run, clock: str, phase: Phase | None = None) -> list[View]:
    """One cell for each shape of the first level that has any, with one adapter: cold, of about RANK, most targets."""
    fitting = [
        view
        for view in views(run, clock)
        if view.cell.adapters == 1 and phase in (None, view.cell.phase) and view.unmerged()
    ]
    for level in LEVELS:
        found: dict[str, View] = {}
        for view in sorted((view for view in fitting if view.cell.workload == level), key=plainness):
            found.setdefault(view.cell.shape, view)
        if found:
            return list(found.values())
    return []


def plainness(view: View) -> tuple[float, ...]:
    """Smaller for a cell that a reader would expect: cold, rank, targets, one sequence, about PROMPT tokens."""
    cell = view.cell
    length = abs(log(cell.length / PROMPT)) if cell.phase == "prefill" else 0.0
    return (cell.cache != "cold", abs(log(cell.rank / RANK)), -len(view.measured.modules), cell.batch, length)


def about(view: View) -> str:
    """A cell in words."""
    cell, many = view.cell, len(view.measured.modules)
    each = "1 token" if cell.length == 1 else f"{cell.length:,} tokens"
    tokens = f"{cell.batch} x {each}" if cell.batch > 1 else each
    modules = f"{many} modules" if many > 1 else "1 module"
    return f"{cell.workload} {cell.shape}, {tokens}, r = {cell.rank}, {modules}, by {view.clock}"

"""The line: cells -> subjects -> rows, beside the ceilings of the same run.

Every cell that was asked for is in the results, and every backend in each: with times, or with the reason why not.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.latency import ceilings as limits
from benchmarks.latency import gate, measure, plugins
from benchmarks.latency.environment import ended, environment
from benchmarks.latency.nouns import Backend, Cell, Clock, Measured, Place, Results, Row, Workload
from benchmarks.latency.place import settled
from benchmarks.latency.results import Kept
from lora_check.errors import LoraCheckError, UsageError

SEED = 0
"""Of the problems: they are seeded by their cells alone."""
MERGING = "eager_wall"
"""The clock of a merge on the device: it is done once, by a loop."""
SHARE = 0.1
"""Of the seconds of a run, what its ceilings may take."""


@dataclass(slots=True)
class Watch:
    """How the seconds of a run are shared among the cells that are left."""

    seconds: float
    began: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """Seconds, below 0 when they are spent."""
        return self.seconds - (time.perf_counter() - self.began)

    def share(self, cells: int, beside: Sequence[float]) -> float:
        """Seconds for the rounds of the next of so many cells; `beside`: what cells took so far beside their rounds."""
        expected = sum(beside) / len(beside) if beside else 0.0
        return max(0.0, self.left / cells - expected)


def run(
    cells: Mapping[Cell, Sequence[str]],
    backends: Sequence[Backend],
    place: Place,
    *,
    seconds: float,
    rounds: int,
    command: Sequence[str],
    commit: str = "",
    file: Path | None = None,
    tell: Callable[[Cell], None] = lambda _: None,
) -> Results:
    """Measure every cell under every backend that serves it.

    cells     each with the backends that are not asked there
    seconds   about how long it may take; cells that are not begun by then are told as such
    commit    of the code, where its repository is not at hand
    file      holds the results so far after every cell
    tell      is called with each cell before it is measured
    """
    watch, clocks = Watch(seconds), tuple(plugins.load("clocks").values())
    with settled(place):
        header = environment(place, seed=SEED, command=command, commit=commit)
        dtypes = [cell.dtype for cell in cells]
        found = limits.measured(place, [*dtypes, "float32"], clocks, seconds=max(2.0, SHARE * seconds))
    kept = Kept(file, header, found) if file else None
    done, beside = list[Measured](), list[float]()
    for index, (cell, without) in enumerate(cells.items()):
        tell(cell)
        began, budget = time.perf_counter(), watch.share(len(cells) - index, beside)
        mine = [one for one in serving(backends, cell) if one.name not in without]
        done.append(_measured(cell, mine, clocks, place, rounds, budget, over=watch.left <= 0))
        beside.append(max(0.0, time.perf_counter() - began - budget))
        if kept:
            kept.add(done[-1])
    header = ended(header, place)
    if kept:
        kept.end(header)
    return Results(environment=header, ceilings=found, cells=tuple(done))


def serving(backends: Iterable[Backend], cell: Cell) -> tuple[Backend, ...]:
    """Those that serve so many adapters."""
    return tuple(backend for backend in backends if (backend.many if cell.adapters > 1 else backend.one))


def chosen(names: Sequence[str]) -> tuple[Backend, ...]:
    """The backends of these names, and those that are merged; all without names.

    raises   UsageError: there is no such backend
    """
    known = plugins.load("backends")
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"there is no backend {unknown[0]!r}", hint=f"one of: {', '.join(known)}")
    return tuple(one for one in known.values() if not names or one.merged or one.name in names)


def _measured(
    cell: Cell,
    mine: Sequence[Backend],
    clocks: Sequence[Clock],
    place: Place,
    rounds: int,
    budget: float,
    *,
    over: bool,
) -> Measured:
    workload: Workload = plugins.load("workloads")[cell.workload]
    modules = workload.modules(cell)
    reason = "the seconds of this run were spent before it" if over else workload.missing(cell, place)
    if reason:
        return Measured(cell=cell, modules=modules, rows=tuple(_absent(one, reason) for one in mine))
    unfit = {one.name: _absent(one, reason) for one in mine if (reason := one.unfit(modules, place))}
    try:
        with settled(place):
            subject = workload.make(cell, place)
        fit = [one for one in mine if one.name not in unfit]
        rows = measure.measured(subject, fit, clocks, place, rounds=rounds, budget=0.9 * budget)
        clock = plugins.load("clocks")[MERGING]
        merge = measure.merge(subject, clock, place, rounds=rounds, budget=0.1 * budget)
        order = [one.name for one in mine]
        rows = tuple(sorted((*rows, *unfit.values()), key=lambda row: order.index(row.backend)))
        return Measured(cell=cell, modules=modules, rows=rows, merge=merge)
    except (RuntimeError, MemoryError, ImportError, OSError, LoraCheckError) as error:
        reason = f"it could not be made: {gate.reason(error)}"
        return Measured(cell=cell, modules=modules, rows=tuple(_absent(one, reason) for one in mine))
    finally:
        _release(place)


def _absent(backend: Backend, reason: str) -> Row:
    return Row(
        backend=backend.name,
        about=backend.about,
        adapter=backend.adapter,
        traffic=backend.traffic,
        merged=backend.merged,
        missing=reason,
    )


def _release(place: Place) -> None:
    """Give back what a cell took on a GPU, and forget what was compiled for its shapes."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.collect()
    if place.kind == "cuda":
        import torch

        torch.cuda.empty_cache()

"""pytest benchmarks/latency/bench_host.py: what a host clock can time, under pytest-benchmark, beside device clocks.

One small linear layer. Every unmerged backend runs beside merged; seconds are shown, and what is asserted is a ratio in
one run: an order that the counted traffic demands. Device clocks and floors stand in `extra_info`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from benchmarks.latency import ceilings as limits
from benchmarks.latency import plugins, verdicts
from benchmarks.latency.figures import overhead, spread, summary
from benchmarks.latency.gate import build, installed
from benchmarks.latency.measure import measured
from benchmarks.latency.nouns import Backend, Ceilings, Cell, Measured, Place, Subject
from benchmarks.latency.place import place_of, settled, synchronise

ORDER = ("two_gemm", "eager", "peft_float32")
"""From the least traffic to the most: each passes over the activations more often than the one before."""
CELL = Cell(workload="linear", shape="llama-3-8b/q", batch=1, length=256)


@pytest.fixture(scope="module")
def place() -> Place:
    return place_of("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def subject(place: Place) -> Iterator[Subject]:
    with settled(place):
        yield plugins.load("workloads")[CELL.workload].make(CELL, place)


@pytest.fixture(scope="module")
def seen(place: Place, subject: Subject) -> Measured:
    """The cell by all clocks of the place."""
    backends, clocks = plugins.load("backends"), tuple(plugins.load("clocks").values())
    chosen = [backends[name] for name in ("merged", *ORDER)]
    rows = measured(subject, chosen, clocks, place, rounds=9, budget=30.0)
    return Measured(cell=CELL, modules=plugins.load("workloads")[CELL.workload].modules(CELL), rows=rows)


@pytest.fixture(scope="module")
def ceilings(place: Place) -> Ceilings:
    with settled(place):
        return limits.measured(place, [CELL.dtype, "float32"], seconds=3.0)


@pytest.mark.parametrize("name", ["merged", *ORDER])
def test_forward(benchmark: Any, place: Place, subject: Subject, seen: Measured, ceilings: Ceilings, name: str) -> None:
    backend: Backend = plugins.load("backends")[name]
    row = next(row for row in seen.rows if row.backend == name and not row.again)
    with settled(place):
        trial = build(subject, backend, place)
        turn = iter(range(1 << 40))

        def call() -> None:
            index = next(turn) % len(subject.copies)
            subject.call(subject.copies[index], subject.inputs[index])
            synchronise(place)

        with installed(subject, trial.modules):
            benchmark(call)
    judged = verdicts.judged(seen, ceilings)
    for clock, timing in row.clocks.items():
        if timing.samples:
            said = judged[(name, False, clock)]
            benchmark.extra_info[clock] = summary(timing).median
            benchmark.extra_info[f"{clock}: floor"] = said.floor
            benchmark.extra_info[f"{clock}: verdict"] = said.word
            assert said.word != "invalid", said.reason


def test_the_order_of_the_traffic(seen: Measured) -> None:
    merged = next(row for row in seen.rows if row.merged and not row.again)
    rows = {row.backend: row for row in seen.rows if not row.again}
    found = [overhead(rows[name], merged, "device_busy") for name in ORDER]
    apart = spread(seen, "device_busy")
    assert all(found)
    assert apart is not None
    medians = [one.median for one in found if one]
    assert all(later > earlier - 2 * apart for earlier, later in pairwise(medians)), medians

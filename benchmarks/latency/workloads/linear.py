"""One linear layer of a model's shape: what one adapter costs, with nothing beside it."""

from __future__ import annotations

from benchmarks.latency.nouns import Cell, Place, Subject, Workload
from benchmarks.latency.workloads import _bytes


def make(cell: Cell, place: Place) -> Subject:
    """Copies of the module, each with x (batch, length, K)."""
    from benchmarks.latency.workloads import _linear

    return _linear.subject(cell, place)


WORKLOAD = Workload(
    name="linear",
    about="one linear layer",
    place=0,
    make=make,
    modules=_bytes.module_modules,
    missing=_bytes.missing_module,
)

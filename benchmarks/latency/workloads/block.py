"""One decoder layer: what an adapter costs beside attention, norms and the products that it does not touch."""

from __future__ import annotations

from benchmarks.latency.nouns import Cell, Place, Subject, Workload
from benchmarks.latency.workloads import _bytes


def make(cell: Cell, place: Place) -> Subject:
    """Copies of the layer, each with x (batch, length, hidden)."""
    from benchmarks.latency.workloads import _decoder

    return _decoder.layer_subject(cell, place)


WORKLOAD = Workload(
    name="block",
    about="one decoder layer of transformers, attention and norms included",
    place=1,
    make=make,
    modules=_bytes.layer_modules,
    missing=_bytes.missing_layer,
)

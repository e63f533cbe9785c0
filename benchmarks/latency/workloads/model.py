"""A whole causal model, from ids to the logits of the last position."""

from __future__ import annotations

from benchmarks.latency.nouns import Cell, Place, Subject, Workload
from benchmarks.latency.workloads import _bytes


def make(cell: Cell, place: Place) -> Subject:
    """The model, or copies of one that a cache would hold, with ids (batch, length)."""
    from benchmarks.latency.workloads import _decoder

    return _decoder.model_subject(cell, place)


WORKLOAD = Workload(
    name="model",
    about="a whole causal model of transformers, from ids to the logits of the last position",
    place=2,
    make=make,
    modules=_bytes.model_modules,
    missing=_bytes.missing_model,
)

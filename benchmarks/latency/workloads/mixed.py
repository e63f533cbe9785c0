"""n adapters over the sequences of one batch, on one linear layer or one decoder layer, as a server of many has them.

The shape says which: "llama-3-8b/q" is a module, "llama-3-8b" a layer.
"""

from __future__ import annotations

from benchmarks.latency import shapes
from benchmarks.latency.nouns import Cell, Place, Subject, Workload
from benchmarks.latency.workloads import _bytes


def make(cell: Cell, place: Place) -> Subject:
    """The subject of one adapter, with n at each target."""
    from benchmarks.latency.workloads import _decoder, _linear

    return _linear.subject(cell, place) if shapes.is_module(cell.shape) else _decoder.layer_subject(cell, place)


def modules(cell: Cell) -> tuple[tuple[int, int], ...]:
    """(N, K) of the module, or of the targets of the layer."""
    return _bytes.module_modules(cell) if shapes.is_module(cell.shape) else _bytes.layer_modules(cell)


def missing(cell: Cell, place: Place) -> str:
    """Only one adapter, or what is missing for one."""
    if cell.adapters < 2:
        return "a mixed batch has two adapters at least"
    return _bytes.missing_module(cell, place) if shapes.is_module(cell.shape) else _bytes.missing_layer(cell, place)


WORKLOAD = Workload(
    name="mixed",
    about="several adapters in one batch, each sequence with its own",
    place=3,
    make=make,
    modules=modules,
    missing=missing,
)

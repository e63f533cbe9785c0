"""Which cells are measured: grids by name, and what a user puts in place of their values.

tiny      seconds on any machine, for tests: every workload and every backend
control   minutes on a CPU: the same code on shapes that a CPU computes in milliseconds
full      minutes on a GPU: modules, layers and whole models of real shapes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from benchmarks.latency.nouns import Cache, Cell
from benchmarks.latency.shapes import is_module
from lora_check.errors import UsageError

DECODING = 64
"""Tokens up to which they are one new token of so many sequences; more are the prompt of one sequence."""
QV = ("q_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Every combination of some values.

    context   of decoding: tokens that each sequence has in its cache       without   backends that are not asked here
    """

    workload: str
    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...] = (16,)
    targets: tuple[tuple[str, ...], ...] = ((),)
    adapters: tuple[int, ...] = (1,)
    caches: tuple[Cache, ...] = ("cold",)
    dtype: str = "bfloat16"
    context: int = 0
    without: tuple[str, ...] = ()

    def cells(self) -> Iterator[Cell]:
        """In the order of the fields, tokens last."""
        each = product(self.shapes, self.ranks, self.targets, self.adapters, self.caches, self.tokens)
        for shape, rank, targets, adapters, cache, tokens in each:
            batch, length = (tokens, 1) if tokens <= DECODING else (1, tokens)
            if batch < adapters:
                continue
            yield Cell(
                workload=self.workload,
                shape=shape,
                batch=batch,
                length=length,
                context=self.context if length == 1 else 0,
                rank=rank,
                targets=targets,
                adapters=adapters,
                dtype=self.dtype,
                cache=cache,
            )


TINY = (
    Grid(workload="linear", shapes=("tiny-llama/down",), tokens=(1, 96), ranks=(5,), caches=("hot",), dtype="float32"),
    Grid(workload="block", shapes=("tiny-qwen2",), tokens=(2,), ranks=(5,), dtype="float32", context=8),
    Grid(workload="model", shapes=("tiny-mistral",), tokens=(1, 65), ranks=(5,), context=8),
    Grid(
        workload="mixed",
        shapes=("tiny-llama/q",),
        tokens=(4,),
        ranks=(5,),
        adapters=(2,),
        caches=("hot",),
        dtype="float32",
    ),
)
CONTROL = (
    Grid(workload="linear", shapes=("llama-3-8b/q",), tokens=(1, 32, 256)),
    Grid(workload="linear", shapes=("small/q",), tokens=(1, 256), ranks=(4, 64), caches=("cold", "hot")),
    Grid(workload="linear", shapes=("small/down",), tokens=(1, 256), dtype="float32"),
    Grid(workload="block", shapes=("smollm2-135m",), tokens=(1, 128), context=128),
    Grid(workload="mixed", shapes=("small/q",), tokens=(16,), adapters=(2, 4, 8)),
    Grid(workload="model", shapes=("smollm2-135m-real",), tokens=(1, 128), targets=((), QV), context=128),
)
COMPILED = ("compiled", "compiled_plain")
"""They compile anew for each shape, some seconds each."""
MODULES = ("llama-3-8b/q", "llama-3-8b/k", "llama-3-8b/gate", "llama-3-8b/down", "llama-3-70b/q")
FULL = (
    Grid(workload="model", shapes=("llama-3-8b",), tokens=(1, 2048, 64), context=512),
    Grid(workload="block", shapes=("llama-3-8b", "llama-3-70b"), tokens=(1, 2048), context=512),
    Grid(workload="linear", shapes=("llama-3-8b/q",), tokens=(1, 2048)),
    Grid(workload="linear", shapes=MODULES, tokens=(1, 32, 512, 2048, 8192), without=COMPILED),
    Grid(workload="mixed", shapes=("llama-3-8b",), tokens=(64,), adapters=(2, 8, 32, 64), context=512),
    Grid(workload="linear", shapes=("llama-3-8b/q",), tokens=(1, 2048), ranks=(4, 64, 256), without=COMPILED),
    Grid(workload="linear", shapes=("llama-3-8b/q",), tokens=(1, 32), caches=("hot",), without=COMPILED),
    Grid(workload="model", shapes=("llama-3-8b",), tokens=(1,), targets=(QV,), context=512, without=COMPILED),
    Grid(workload="model", shapes=("qwen2.5-0.5b",), tokens=(1, 512), context=512),
    Grid(workload="model", shapes=("qwen2.5-7b", "mistral-7b"), tokens=(1, 2048), context=512, without=COMPILED),
    Grid(workload="model", shapes=("smollm2-135m", "smollm2-135m-real"), tokens=(1,), context=512, without=COMPILED),
    Grid(workload="mixed", shapes=("llama-3-8b/q",), tokens=(64,), adapters=(2, 8, 32)),
    Grid(workload="block", shapes=("llama-3-8b",), tokens=(16, 8192), context=512, without=COMPILED),
)
"""The most important first, for what is not reached in the seconds of a run is not measured."""
SUITES: Mapping[str, tuple[Grid, ...]] = {"tiny": TINY, "control": CONTROL, "full": FULL}


def default(kind: str) -> str:
    """The suite of a kind of device."""
    return "full" if kind == "cuda" else "control"


def asked(
    name: str,
    *,
    workloads: Sequence[str] = (),
    shapes: Sequence[str] = (),
    tokens: Sequence[int] = (),
    ranks: Sequence[int] = (),
    dtype: str = "",
) -> dict[Cell, tuple[str, ...]]:
    """Cell -> the backends that are not asked there, in the order of a suite, each once.

    workloads                       of these alone
    shapes, tokens, ranks, dtype    in place of those of the suite
    raises   UsageError: no such suite, or nothing is left of it
    """
    if name not in SUITES:
        raise UsageError(f"there is no suite {name!r}", hint=f"one of: {', '.join(SUITES)}")
    grids = [grid for grid in SUITES[name] if not workloads or grid.workload in workloads]
    given: dict[str, Any] = {"tokens": tuple(tokens), "ranks": tuple(ranks), "dtype": dtype}
    if shapes:
        grids = [replace(grid, shapes=fitting) for grid in grids if (fitting := _fitting(grid, shapes))]
    changed = [replace(grid, **{field: value for field, value in given.items() if value}) for grid in grids]
    found = {cell: grid.without for grid in reversed(changed) for cell in reversed(tuple(grid.cells()))}
    if not found:
        known = ", ".join(dict.fromkeys(grid.workload for grid in SUITES[name]))
        raise UsageError(f"no cell of the suite {name!r} is left", hint=f"its workloads are {known}")
    return dict(reversed(found.items()))


def cells(name: str, **options: Any) -> tuple[Cell, ...]:
    """The cells of a suite, with the options of `asked`."""
    return tuple(asked(name, **options))


def _fitting(grid: Grid, shapes: Sequence[str]) -> tuple[str, ...]:
    """Those of the shapes that are of the kind that a workload takes: modules, layers and models, or either."""
    kinds = {is_module(shape) for shape in grid.shapes} | ({True, False} if grid.workload == "mixed" else set())
    return tuple(shape for shape in shapes if is_module(shape) in kinds)

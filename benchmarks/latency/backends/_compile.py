"""torch.compile: what it needs, and how it is called here."""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.latency.backends._kernel_place import no_kernels

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.latency.nouns import Place

SHAPES = 64
"""One piece of code serves all modules of a cell, compiled for each shape: models have four, PyTorch allows eight."""


def compiled(module: nn.Module) -> Any:
    """The module under torch.compile with its defaults; compiled by the first call at each shape, never timed.

    Shapes are static, as decoding and prefill have their own. The whole graph or an error: what PyTorch cannot compile,
    or will not once more, it would run as it is, and the row would say compiled. Between cells the caller makes Dynamo
    forget (`torch._dynamo.reset()`); no build does, as modules built before may still be called. What PyTorch tells
    itself meanwhile (its own deprecations) and what is meant to be so (float32 without TF32) is not told again.
    """
    import torch
    from torch._dynamo import config

    config.cache_size_limit = max(config.cache_size_limit, SHAPES)  # by its older name, which all versions know
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    return torch.compile(module, fullgraph=True, dynamic=False)


def no_compiler(place: Place) -> str:
    """Why torch.compile cannot work in a place: Triton on a GPU, a C++ compiler and Python's headers on a CPU."""
    if place.kind == "cuda":
        return no_kernels(place)
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and there is no {compiler}; CXX names another"
    headers = Path(sysconfig.get_paths()["include"])
    return "" if (headers / "Python.h").exists() else f"torch.compile needs Python's headers, and {headers} has none"

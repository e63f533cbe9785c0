"""torch.compile of the plain expression, in the dtype of the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.latency.backends._adapted import Formula
from benchmarks.latency.backends._compile import compiled, no_compiler
from benchmarks.latency.nouns import Backend

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.latency.nouns import Site


def build(site: Site) -> nn.Module:
    """The expression of `eager`, compiled as one graph."""
    module: nn.Module = compiled(Formula(site))
    return module


BACKEND = Backend(
    name="compiled_plain",
    about="`torch.compile` of `x W^T + (x A^T B^T) s` with adapters in the dtype of the base",
    place=31,
    build=build,
    missing=no_compiler,
    traffic="compiled",
)

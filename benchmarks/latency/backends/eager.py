"""The expression as it stands in the paper."""

from __future__ import annotations

from benchmarks.latency.backends._adapted import Formula
from benchmarks.latency.nouns import Backend

BACKEND = Backend(
    name="eager",
    about="`x W^T + (x A^T B^T) s` in plain PyTorch: four more kernels",
    place=11,
    build=Formula,
    traffic="eager",
)

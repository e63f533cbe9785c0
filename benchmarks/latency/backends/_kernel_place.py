"""Whether a Triton kernel can run in a place."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from subprocess import CalledProcessError
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.latency.nouns import Place


def no_kernels(place: Place) -> str:
    """Why not, with the remedy where there is one; else empty."""
    if place.kind != "cuda":
        return "the kernel is written in Triton and needs a GPU"
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    return no_driver()


@cache
def no_driver() -> str:
    """Why Triton does not start on the GPU: its driver is compiled when first used, by a C compiler it has to find."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except (AssertionError, CalledProcessError, ImportError, OSError, RuntimeError) as error:
        return f"Triton does not start here: {' '.join(str(error).split())}"
    return ""

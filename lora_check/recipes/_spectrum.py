"""FourierFT and WaveFT train some elements of a matrix of coefficients, at places that a seed gives."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lora_check.types import Site

if TYPE_CHECKING:
    from torch import Tensor

COMMON = frozenset({"bias", "n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling"})
"""Keys that both have; how many coefficients there are, the tensor shows."""


def seed_and_scale(raw: Mapping[str, Any], scaling: float) -> dict[str, Any]:
    """The seed of the places and the factor on the delta; `scaling` is PEFT's default."""
    scale = raw.get("scaling")
    return {"seed": raw.get("random_loc_seed", 777), "scaling": float(scaling if scale is None else scale)}


def seedless(raw: Mapping[str, Any]) -> str:
    """Adapters whose coefficients lie where nobody can say."""
    if isinstance(raw.get("random_loc_seed", 777), int):
        return ""
    return "without random_loc_seed nobody knows which coefficients were trained"


def fits(site: Site) -> bool:
    """No more coefficients than the weight has elements."""
    if set(site.roles) != {"c"} or site.leaf != "weight" or len(site.shape) != 2:
        return False
    count = site.roles["c"]
    return len(count) == 1 and count[0] <= site.shape[0] * site.shape[1]


def places(site: Site) -> tuple[Tensor, Tensor]:
    """Row and column of each coefficient in the (out, in) matrix: the first of a random order of all its elements."""
    rows, columns = oriented(site)
    first = _first(rows * columns, site.roles["c"][0], site.settings["seed"])
    return first // columns, first % columns


def oriented(site: Site) -> tuple[int, int]:
    """(out, in) of the weight."""
    rows, columns = site.shape[::-1] if site.in_out else site.shape
    return rows, columns


@lru_cache(maxsize=8)
def _first(elements: int, count: int, seed: int) -> Tensor:
    import torch

    order = torch.randperm(elements, generator=torch.Generator().manual_seed(seed))
    return order[:count].clone()

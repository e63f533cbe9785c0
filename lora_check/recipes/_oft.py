"""OFT's names, and the rotations that its linear, convolution and embedding layers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt, sqrt
from typing import Any

from lora_check.types import LoadedStep, Method, Numbers, Site


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """How the rotation is made of the triangles; PEFT's defaults where the configuration is silent."""
    neumann = raw.get("use_cayley_neumann")
    terms = raw.get("num_cayley_neumann_terms")
    return {
        "share": bool(raw.get("block_share")),
        "eps": float(raw.get("eps") or 6e-5) if raw.get("coft") else 0.0,
        "terms": 0 if neumann is False else int(5 if terms is None else terms),
        "last": 1.0,
    }


METHOD = Method(
    name="OFT",
    roles={"oft_R": "Q", "oft_embedding_R": "embedding_Q"},
    keys=frozenset(
        {
            "bias",
            "block_share",
            "coft",
            "eps",
            "module_dropout",
            "num_cayley_neumann_terms",
            "oft_block_size",
            "r",
            "use_cayley_neumann",
        }
    ),
    settings=settings,
)


def block_size(elements: int) -> int:
    """b, of the b (b - 1) / 2 elements of its upper triangle; 0 if there is none."""
    size = (1 + isqrt(1 + 8 * elements)) // 2
    return size if size * (size - 1) // 2 == elements else 0


def older(step: LoadedStep) -> LoadedStep:
    """The series of PEFT 0.16 and 0.17: its last coefficient is 2 as well."""
    assert step.site is not None
    return replace(step, site=replace(step.site, settings={**step.site.settings, "last": 2.0}))


def rotations(packed: Numbers, site: Site) -> Numbers:
    """R of each block.   packed (blocks, b (b - 1) / 2) -> (blocks, b, b)."""
    skew = _skew(_shortened(packed, site.settings["eps"]) if site.settings["eps"] else packed)
    return _series(skew, site.settings["terms"], site.settings["last"]) if site.settings["terms"] else cayley(skew)


def _skew(packed: Numbers) -> Numbers:
    """Q = U - U^T, U the strict upper triangle."""
    import torch

    from lora_check.functions import moved

    size = block_size(int(packed.shape[1]))
    rows, columns = torch.triu_indices(size, size, 1)

    def unpacked(x: torch.Tensor) -> torch.Tensor:
        full = x.new_zeros(x.shape[0], size, size)
        full[:, rows, columns] = x
        return full

    upper = moved(packed, unpacked)
    return upper - upper.mT


def _shortened(packed: Numbers, eps: float) -> Numbers:
    """Each triangle shortened so that its skew matrix, which holds it twice, has at most the norm eps / sqrt(blocks)."""
    from lora_check.ball import norm
    from lora_check.functions import chosen, middle

    largest = eps / sqrt(int(packed.shape[0]))
    length = norm(packed) * sqrt(2)
    return chosen(middle(length) <= largest, packed, (packed / length) * largest)


def _series(skew: Numbers, terms: int, last: float) -> Numbers:
    """I + 2 Q + 2 Q^2 + ... + c Q^(t-1), the terms added from the left as PEFT does."""
    from lora_check.functions import identity

    total, power = identity(skew), skew
    if terms > 1:
        total = total + skew * 2.0
    if terms > 2:
        power = skew @ skew
        total = total + power * 2.0
        for _ in range(3, terms - 1):
            power = power @ skew
            total = total + power * 2.0
        total = total + (power @ skew) * last
    return total


def cayley(skew: Numbers) -> Numbers:
    """(I - Q) (I + Q)^-1."""
    from lora_check.functions import identity, solved

    eye = identity(skew)
    return solved((eye + skew).mT, (eye - skew).mT).mT

"""OFT's names, and the rotations that its linear, convolution and embedding layers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt, prod
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
    roles={"oft_R": "Q", "oft_embedding_R": "embedding_Q", "oft_r": "X", "oft_s": "s"},
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
    made = skew(packed)
    if site.settings["eps"]:
        made = shortened(made, site.settings["eps"])
    return series(made, site.settings["terms"], site.settings["last"]) if site.settings["terms"] else cayley(made)


def skewed(x: Numbers, eps: float) -> Numbers:
    """(X - X^T) / 2 of each block of the older files, which hold whole matrices."""
    full = shortened(x, eps) if eps else x
    return (full - full.mT) * 0.5


def skew(packed: Numbers) -> Numbers:
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


def shortened(x: Numbers, eps: float) -> Numbers:
    """Each block shortened so that its norm is at most eps / sqrt(blocks).   x (blocks, b, b)."""
    import torch

    from lora_check.ball import norm
    from lora_check.functions import chosen, like, middle

    flat = x.reshape(int(x.shape[0]), -1)
    length, largest = norm(flat), like(x, 1.0) / norm(like(x, torch.ones(1, int(x.shape[0])))) * eps
    return chosen(middle(length) <= middle(largest), flat, (flat / length) * largest).reshape(*x.shape)


def series(skew: Numbers, terms: int, last: float) -> Numbers:
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
    return solved(eye + skew, eye - skew, left=False)


def turned_columns(w: Numbers, rotation: Numbers) -> Numbers:
    """W with each block of columns multiplied by a matrix from the right.   rotation (blocks, b, b), or (1, b, b)."""
    from lora_check.functions import moved, multiplied

    size = int(rotation.shape[-1])
    blocks = moved(w, lambda x: x.reshape(x.shape[0], -1, size).transpose(0, 1))
    return moved(multiplied(blocks, rotation), lambda x: x.transpose(0, 1).reshape(x.shape[1], -1))


def are_triangles(packed: tuple[int, ...], site: Site) -> bool:
    """Triangles of blocks that together are as wide as the weight, or one for all of them."""
    if len(packed) != 2:
        return False
    blocks, size, width = packed[0], block_size(packed[1]), prod(site.shape[1:])
    return size > 1 and width % size == 0 and (blocks * size == width or (blocks == 1 and site.settings["share"]))

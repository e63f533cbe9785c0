"""VeRA's and PVeRA's names, and the projections that all modules share, read or drawn again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from math import sqrt
from typing import TYPE_CHECKING, Any

from lora_check.types import Factors, Hand, LoadedStep, Method, Numbers, Site

if TYPE_CHECKING:
    from torch import Tensor


def method(name: str) -> Method:
    """VERA's Method, or PVERA's, whose names have a p in front."""
    prefix = name.lower()
    return Method(
        name=name,
        roles={f"{prefix}_lambda_b": "b", f"{prefix}_lambda_d": "d"},
        shared={f"{prefix}_A": "A", f"{prefix}_B": "B"},
        keys=frozenset(
            {
                "bias",
                "d_initial",
                "generator_seed",
                "projection_prng_key",
                "sample_at_inference",
                "save_projection",
                f"{prefix}_dropout",
            }
        ),
        settings=settings,
    )


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """The seed of the projections, the largest dimensions of all targets as stored, and whether they are drawn again.

    Source: PEFT tuners/vera/model.py VeraModel._find_dim, _init_vera_A_vera_B.
    """
    matrices = [shape for shape in targets.values() if len(shape) == 2]
    return {
        "saved": bool(raw.get("save_projection", True)),
        "seed": int(raw.get("projection_prng_key") or 0),
        "largest": tuple(max(sizes) for sizes in zip(*matrices, strict=True)),
        "rounded": not raw.get("save_projection", True),
    }


def older(step: LoadedStep) -> LoadedStep:
    """PEFT 0.12 to 0.20 rounded saved projections to the dtype of the base too."""
    assert step.site is not None
    site = replace(step.site, settings={**step.site.settings, "rounded": True})
    return replace(step, site=site)


def scaled_factors(factors: Factors, site: Site, hand: Hand, above: int) -> Factors:
    """`left` diag(b) B[:out] and `right` diag(d) A[:, :in], or their transposes where the weight is kept (in, out).

    above   rows of A for each row of `right`: 2 where A has a second half for what is not merged
    """
    rows, columns = oriented(site)
    rank = int(factors["d"].shape[0]) // above
    a, b = (hand.settle(one) if site.settings["rounded"] else one for one in _projections(factors, site, above))
    left = factors["b"].reshape(-1, 1) * b[:rows]
    right = factors["d"].reshape(-1, 1)[:rank] * a[:rank, :columns]
    return {"left": right.T, "right": left.T} if site.in_out else {"left": left, "right": right}


def product(factors: Factors, rows: slice) -> Numbers:
    """(left right)[rows]."""
    return factors["left"][rows] @ factors["right"]


def fits(site: Site, above: int) -> bool:
    """One vector for the outputs and one for the rank, with projections at least as large, or a seed for them."""
    roles = site.roles
    if site.leaf != "weight" or len(site.shape) != 2 or set(roles) - {"A", "B"} != {"b", "d"}:
        return False
    (rows, columns), d = oriented(site), roles["d"]
    if roles["b"] != (rows,) or len(d) != 1 or d[0] % above:
        return False
    if not site.settings["saved"]:
        return set(roles) == {"b", "d"}
    a, b = roles.get("A", ()), roles.get("B", ())
    return len(a) == len(b) == 2 and (a[0], b[1]) == (d[0], d[0] // above) and a[1] >= columns and b[0] >= rows


def oriented(site: Site) -> tuple[int, int]:
    """(out, in) of the weight."""
    rows, columns = site.shape[::-1] if site.in_out else site.shape
    return rows, columns


def _projections(factors: Factors, site: Site, above: int) -> tuple[Numbers, Numbers]:
    from lora_check.functions import like

    if "A" in factors:
        return factors["A"], factors["B"]
    rows, columns = site.settings["largest"][::-1] if site.in_out else site.settings["largest"]
    rank = int(factors["d"].shape[0])
    a, b = _drawn(site.settings["seed"], (rank, columns), (rows, rank // above))
    return like(factors["d"], a), like(factors["d"], b)


@lru_cache(maxsize=2)
def _drawn(seed: int, *shapes: tuple[int, int]) -> tuple[Tensor, ...]:
    """Uniform in +-sqrt(6 / columns), one matrix after the other, by torch's generator for CPUs."""
    import torch

    generator = torch.Generator(device="cpu").manual_seed(seed)
    bounds = [sqrt(3.0) * (sqrt(2.0) / sqrt(columns)) for _, columns in shapes]
    return tuple(
        torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        for shape, bound in zip(shapes, bounds, strict=True)
    )

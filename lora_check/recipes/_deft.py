"""DEFT's names and configuration, and the formula that its ways of projecting share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_check.types import Factors, Method, Numbers, Site


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """How P projects, and alpha."""
    return {"way": _way(raw), "para": bool(raw.get("para")), "alpha": float(raw.get("alpha") or 0)}


def refuses(raw: Mapping[str, Any]) -> str:
    """Ways of projecting that are not known."""
    return "" if _way(raw) in ("relu", "qr") else f"the decomposition_method {_way(raw)!r} is not known to this version"


def _way(raw: Mapping[str, Any]) -> str:
    return str(raw.get("decomposition_method") or "relu")


METHOD = Method(
    name="DEFT",
    roles={"deft_P": "P", "deft_R": "R"},
    keys=frozenset({"alpha", "bias", "decomposition_method", "deft_dropout", "init_scale", "para"}),
    settings=settings,
    refuses=refuses,
)

EXACT = frozenset({"P", "R"})
"""Tensor cores would cut W short as well as P, which costs more than most deltas are large: not taken for honest."""


def logical(w: Numbers, site: Site) -> Numbers:
    """W as (out, in)."""
    return w.T if site.in_out else w


def pair(q: Numbers, taken: Numbers, factors: Factors, site: Site) -> Factors:
    """`left` and `right`, whose product is the delta as the weight is kept: Q times k R less what is taken away."""
    alpha, rank = site.settings["alpha"], site.roles["P"][1]
    core = factors["R"] * (alpha / rank if alpha else 1.0) - taken if "R" in factors else -taken
    return {"left": core.T, "right": q.T} if site.in_out else {"left": q, "right": core}


def product(factors: Factors, rows: slice) -> Numbers:
    """(left right)[rows]."""
    return factors["left"][rows] @ factors["right"]


def fits(site: Site, way: str) -> bool:
    """P as tall as the weight has outputs, and R as wide as it has inputs unless the configuration says `para`."""
    if site.leaf != "weight" or len(site.shape) != 2 or len(site.roles.get("P", ())) != 2:
        return False
    (rows, columns), rank = site.shape[::-1] if site.in_out else site.shape, site.roles["P"][1]
    injected = {} if site.settings["para"] else {"R": (rank, columns)}
    return site.settings["way"] == way and rank <= rows and dict(site.roles) == {"P": (rows, rank), **injected}

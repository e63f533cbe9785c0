"""Deltas that are one product of two matrices, over a weight kept (out, in) or (in, out)."""

from __future__ import annotations

from math import prod

from lora_check.types import Factors, Numbers, Site


def pair(b: Numbers, a: Numbers, site: Site) -> Factors:
    """`left` b and `right` a, or their transposes in each other's place where the weight is kept (in, out).

    b  (out, r)      a  (r, in)
    """
    turned = is_turned(site, int(b.shape[0]), int(a.shape[1]))
    return {"left": a.T, "right": b.T} if turned else {"left": b, "right": a}


def product(factors: Factors, rows: slice) -> Numbers:
    """(left right)[rows]."""
    return factors["left"][rows] @ factors["right"]


def flipped(factors: Factors, rows: slice) -> Numbers:
    """(left right)^T[rows]."""
    return factors["right"].T[rows] @ factors["left"].T


def is_turned(site: Site, outputs: int, inputs: int) -> bool | None:
    """Whether a weight of so many outputs and inputs is kept (in, out); None: it is not of that size.

    The shape tells; for a square weight, what is known of its layer.
    """
    shape = (site.shape[0], prod(site.shape[1:])) if site.leaf == "weight" and site.shape else ()
    if shape == (outputs, inputs) and (outputs != inputs or len(site.shape) > 2 or not site.in_out):
        return False
    return True if len(site.shape) == 2 and shape == (inputs, outputs) else None

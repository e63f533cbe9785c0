"""W' = W + s (D + B' A'), D in k x k blocks of rank r / k.

W    base     (out, in), or (in, out) in a Conv1D of transformers
D    matrix   made of `gralora_A` and `gralora_B` as in `gralora`
A'   factor   (h, in), stored as `gralora_A_general`
B'   factor   (out, h), stored as `gralora_B_general`
s    scale    alpha / (r + h), with h = hybrid_r

The scale that steps know is alpha / r, and a factor r / (r + h) on the sum makes up for it: not bit for bit, for PEFT
rounds one product there. Source: Jung et al., "GraLoRA" (2025), section 3; PEFT tuners/gralora/layer.py
Linear.get_delta_weight.
"""

from collections.abc import Callable

from lora_check.recipes import _paired
from lora_check.recipes._gralora import METHOD, blocks, blocks_fit
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """D and B' A' as products of two matrices, and how much less the scale is."""
    general = _paired.pair(factors["general_B"], factors["general_A"], site)
    r, h = site.settings["r"], site.settings["hybrid_r"]
    return {**blocks(factors, site), "general": general, "share": r / (r + h)}


def product(factors: Factors, rows: slice) -> Numbers:
    """(D + B' A')[rows]."""
    return _both(factors, rows, _paired.product)


def flipped(factors: Factors, rows: slice) -> Numbers:
    """(D + B' A')^T[rows]."""
    return _both(factors, rows, _paired.flipped)


def _both(factors: Factors, rows: slice, one: Callable[[Factors, slice], Numbers]) -> Numbers:
    return (one(factors, rows) + one(factors["general"], rows)) * factors["share"]


def fits(site: Site) -> bool:
    """Blocks, and a pair of factors of the rank that the configuration says."""
    roles = site.roles
    if set(roles) != {"A", "B", "general_A", "general_B"} or not blocks_fit(site):
        return False
    a, b = roles["general_A"], roles["general_B"]
    ranks = len(a) == len(b) == 2 and a[0] == b[1] == site.settings["hybrid_r"]
    return ranks and _paired.is_turned(site, b[0], a[1]) is not None


RECIPE = Recipe(
    name="gralora-hybrid",
    formula="W' = W + s (D + B' A')",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    flipped=flipped,
)

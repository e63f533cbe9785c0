"""W' = W + s B A, with A and B combined from several adapters.

W          base     (out, in), (in, out) with the product transposed, or (out, in, k...)
A_i, B_i   factors  (r_i, in...), (out, r_i...) of each adapter
s          scale    1, or sqrt(r) where the combined adapter inherits use_rslora

How A and B are combined is the combination's page; releases of PEFT differ in the weights (LC308 tells). Where whole
deltas are cut to a rank, the singular value decomposition of another library differs in its last bits.
Source: PEFT tuners/lora/model.py LoraModel.add_weighted_adapter.
"""

from math import prod

from lora_check.recipes._combined import RELEASES, combined, turned_over, widths
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The new factors, or the whole delta, its rows those of the weight."""
    turned = _in_out(site)
    made = combined(factors, site, hand, turned)
    if not turned:
        return made
    return turned_over(made)


def product(factors: Factors, rows: slice) -> Numbers:
    """(B A)[rows]."""
    return factors["whole"][rows] if "whole" in factors else factors["B"][rows] @ factors["A"]


def _in_out(site: Site) -> bool:
    found = widths(site)
    assert found is not None
    return bool(site.in_out) if found[0] == found[1] else (site.shape[0], prod(site.shape[1:])) == found


def fits(site: Site) -> bool:
    """Factors of several adapters over one weight."""
    found = widths(site)
    flat = (site.shape[0], prod(site.shape[1:])) if site.shape else ()
    return found is not None and not _is_embedding(site) and flat in (found, found[::-1])


def _is_embedding(site: Site) -> bool:
    return any(role.startswith("embedding_") for role in site.roles)


RECIPE = Recipe(
    name="lora-combined",
    formula="W' = W + s B A, combined",
    fits=fits,
    prepare=prepare,
    product=product,
    combines=True,
    releases=RELEASES,
)

"""W' = W + s (B A)^T, with the factors of an embedding combined from several adapters.

W          base     (vocab, dim)
A_i, B_i   factors  (r_i, vocab), (dim, r_i), stored as `lora_embedding_A`, `lora_embedding_B`

As lora-combined; PEFT stores the delta in the weight's dtype before it adds it.
Source: PEFT tuners/lora/model.py LoraModel.add_weighted_adapter.
"""

from lora_check.recipes._combined import RELEASES, combined, turned_over, widths
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The new factors, or the whole delta, one row for each token."""
    return turned_over(combined(factors, site, hand, turned=True))


def product(factors: Factors, rows: slice) -> Numbers:
    """(B A)^T[rows]."""
    return factors["whole"][rows] if "whole" in factors else factors["B"][rows] @ factors["A"]


def fits(site: Site) -> bool:
    """Embedding factors of several adapters."""
    return widths(site) == site.shape and all(role.startswith("embedding_") for role in site.roles)


RECIPE = Recipe(
    name="lora-combined-embedding",
    formula="W' = W + s (B A)^T, combined",
    fits=fits,
    prepare=prepare,
    product=product,
    stored=True,
    combines=True,
    releases=RELEASES,
)

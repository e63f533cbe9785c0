"""W' = (W + S) + s B A: a Super-Tuning adapter with a low-rank part.

W         base     (out, in)
values    factor   (n,), stored as `supertuning_values`: the elements of S
indices   factor   (n,), stored as `supertuning_indices`: the place of each in the flattened weight
A         factor   (r, in), stored as `supertuning_lora_A`
B         factor   (out, r), stored as `supertuning_lora_B`
s         scale    lora_alpha / r

PEFT stores the values, their sum with W and the low-rank delta in the weight's dtype. Source: "Super-Tuning" (2026),
arXiv:2607.09287; PEFT tuners/supertuning/layer.py Linear.merge, Linear._lora_delta.
"""

from lora_check.recipes._supertuning import (
    ELEMENTWISE,
    METHOD,
    added,
    factors_fit,
    low_rank,
    saved_places,
    values_fit,
)
from lora_check.types import Recipe, Site


def fits(site: Site) -> bool:
    """A place for each value, and a pair of factors."""
    known = set(site.roles) == {"values", "indices", "A", "B"}
    return known and values_fit(site, saved=True) and factors_fit(site)


RECIPE = Recipe(
    name="supra",
    formula="W' = (W + S) + s B A",
    method=METHOD,
    fits=fits,
    prepare=saved_places,
    product=low_rank,
    apply=added,
    stored=True,
    elementwise=ELEMENTWISE,
)

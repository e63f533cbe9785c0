"""W' = (W + S) + s B A, the values of S at the largest elements of W.

W         base     (out, in)
values    factor   (n,), stored as `supertuning_values`, in the order of the sizes |W| of their elements
A         factor   (r, in), stored as `supertuning_lora_A`
B         factor   (out, r), stored as `supertuning_lora_B`
s         scale    lora_alpha / r

The places are found as in `supertuning-recomputed`, and the sum is stored as in `supra`. Source: "Super-Tuning" (2026),
arXiv:2607.09287; PEFT tuners/supertuning/layer.py SupertuningLayer.update_layer, Linear.merge, Linear._lora_delta.
"""

from lora_check.recipes._supertuning import (
    ELEMENTWISE,
    METHOD,
    added,
    factors_fit,
    low_rank,
    recomputed_places,
    values_fit,
)
from lora_check.types import Recipe, Site


def fits(site: Site) -> bool:
    """As many values as the configuration trains, no places for them that PEFT would read, and a pair of factors."""
    known = {"values", "A", "B"} <= set(site.roles) <= {"values", "indices", "A", "B"}
    return known and values_fit(site, saved=False) and factors_fit(site)


RECIPE = Recipe(
    name="supra-recomputed",
    formula="W' = (W + S by the size of W) + s B A",
    method=METHOD,
    fits=fits,
    prepare=recomputed_places,
    product=low_rank,
    apply=added,
    stored=True,
    reads="whole",
    elementwise=ELEMENTWISE,
)

"""W' = W + S, the values of S at the largest elements of W.

W        base     (out, in)
values   factor   (n,), stored as `supertuning_values`, in the order of the sizes |W| of their elements

With save_precomputed_indices off PEFT ranks the base as it is loaded, and takes the n largest |W|, or the n smallest
with select_top off; n is the share 1 - sparsity of all elements. Equal sizes are ranked as torch does on a CPU; where
that does not reproduce the merge, elements that tie may have any of their values. Source: "Super-Tuning" (2026),
arXiv:2607.09287; PEFT tuners/supertuning/layer.py SupertuningLayer.update_layer, Linear.merge.
"""

from lora_check.recipes._sparse import scattered
from lora_check.recipes._supertuning import ELEMENTWISE, METHOD, recomputed_places, values_fit
from lora_check.types import Recipe, Site


def fits(site: Site) -> bool:
    """As many values as the configuration trains, and no places for them that PEFT would read."""
    return set(site.roles) <= {"values", "indices"} and values_fit(site, saved=False)


RECIPE = Recipe(
    name="supertuning-recomputed",
    formula="W' = W + S by the size of W",
    method=METHOD,
    fits=fits,
    prepare=recomputed_places,
    product=scattered,
    stored=True,
    reads="whole",
    elementwise=ELEMENTWISE,
)

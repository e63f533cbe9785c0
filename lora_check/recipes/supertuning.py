"""W' = W + S, S zero but for the elements that were trained.

W         base     (out, in)
values    factor   (n,), stored as `supertuning_values`: the elements of S
indices   factor   (n,), stored as `supertuning_indices`: the place of each in the flattened weight

PEFT stores the values in the weight's dtype before it adds them. Source: "Super-Tuning" (2026), arXiv:2607.09287; PEFT
tuners/supertuning/layer.py Linear.merge.
"""

from lora_check.recipes._sparse import scattered
from lora_check.recipes._supertuning import ELEMENTWISE, METHOD, saved_places, values_fit
from lora_check.types import Recipe, Site


def fits(site: Site) -> bool:
    """A place for each value."""
    return set(site.roles) == {"values", "indices"} and values_fit(site, saved=True)


RECIPE = Recipe(
    name="supertuning",
    formula="W' = W + S",
    method=METHOD,
    fits=fits,
    prepare=saved_places,
    product=scattered,
    stored=True,
    elementwise=ELEMENTWISE,
)

"""W' = W + S, S zero but for a few elements.

W         base     (out, in)
values    factor   (n,), stored as `shira_weight`: the elements of S
indices   factor   (2, n), stored as `shira_indices`: row and column of each, as floats if saved on Windows

Source: Bhardwaj et al., "Sparse High Rank Adapters" (2024), section 3; PEFT tuners/shira/layer.py
Linear.get_delta_weight.
"""

from lora_check.recipes._sparse import places, scattered, sorted_by_place
from lora_check.types import Factors, Hand, Method, Recipe, Site

METHOD = Method(
    name="SHIRA",
    roles={"shira_weight": "values", "shira_indices": "indices"},
    keys=frozenset({"mask_type", "r", "random_seed"}),
)


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The elements in the order of the flattened weight."""
    from lora_check.functions import middle

    (rows, columns), stored = site.shape, factors["indices"]
    index = places(stored[0], rows, site) * columns + places(stored[1], columns, site)
    return sorted_by_place(factors["values"], index, site, whole=not middle(stored).is_floating_point())


def fits(site: Site) -> bool:
    """One row and one column for each value, over a matrix."""
    roles = site.roles
    if set(roles) != {"values", "indices"} or site.leaf != "weight" or len(site.shape) != 2:
        return False
    return len(roles["values"]) == 1 and roles["indices"] == (2, *roles["values"])


RECIPE = Recipe(
    name="shira",
    formula="W' = W + S",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=scattered,
    elementwise=frozenset({"values", "indices"}),
)

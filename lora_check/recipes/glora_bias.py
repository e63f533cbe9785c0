"""b' = b + (b * D + E + W C).

b, W   base     (out,) and (out, in), as the adapter found them
C      factor   a product of `glora_C.Xd` (in, r) and `glora_C.Xu` (r, 1), or a column `glora_C.X` or `glora_C.zeros`
                (in, 1)
D, E   factor   `glora_D.X`, `glora_E.X` (out,) or (1,), or `glora_D.zeros`, `glora_E.zeros` (out,)

`*` is elementwise. PEFT computes all of it in the model's dtype: each operation is rounded. Source: PEFT
tuners/glora/layer.py GloraLayer.merge.
"""

from lora_check.recipes._glora import METHOD, is_whole, value
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """W C, a column."""
    return {**factors, "carried": hand.settle(factors["weight"] @ value(factors, "C", slice(None), hand))}


def apply(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """(b + (b0 * D + E + W C))[rows] as a column."""
    scaled = hand.settle(factors["W"] * value(factors, "D", rows, hand))
    return w + hand.settle(hand.settle(scaled + value(factors, "E", rows, hand)) + factors["carried"][rows])


def fits(site: Site) -> bool:
    """The paths of a bias; C is measured where the weight is."""
    has_c = {"C_down", "C_whole"} & site.roles.keys()
    return site.leaf == "bias" and bool(has_c) and all(is_whole(site, path, site.shape, (1,)) for path in "DE")


RECIPE = Recipe(
    name="glora-bias",
    formula="b' = b + (b * D + E + W C)",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    apply=apply,
    reads="rows",
    companions={"weight": "weight"},
)

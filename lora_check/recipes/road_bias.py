"""b' = R b, which turns pairs of outputs as `road` does: b1' = f1 b1 - s1 b2, b2' = s2 b1 + f2 b2.

b             base     (out,)
theta, alpha  factor   those of the weight

R is rounded to the model's dtype before it multiplies. Source: PEFT tuners/road/layer.py Linear.merge.
"""

from lora_check.recipes._mixed_rows import apply
from lora_check.recipes._road import METHOD, are_angles, columns, halves_of
from lora_check.types import Factors, Hand, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """R b; a product of a matrix and a vector rounds both terms before it adds them."""
    (first, second), (b1, b2) = columns(factors, site, hand), halves_of(factors["W"], site)
    return {"made": (first * b1 + second * b2).reshape(site.shape[0], -1)}


def fits(site: Site) -> bool:
    """Angles for the outputs of a linear layer with a bias."""
    return site.leaf == "bias" and are_angles(site)


RECIPE = Recipe(
    name="road-bias",
    formula="b' = R b",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    apply=apply,
    reads="merged",
    elementwise=frozenset({"theta", "alpha"}),
)

"""W' = R W, which turns pairs of outputs: x1' = f1 x1 - s1 x2, x2' = s2 x1 + f2 x2.

W       base     (out, in); x1 and x2 are the rows i and i + g / 2 of one group of g = group_size rows
theta   factor   `road_theta`: out / 2 angles (variant road_1), out (road_2) or 2 out (road_4)
alpha   factor   `road_alpha`, of the same length
f, s             alpha cos(theta) and alpha sin(theta): in road_1 both rows of a pair have one angle and alpha, in
                 road_2 each row has its own, in road_4 f and s have their own as well

R is rounded to the model's dtype before it multiplies. Source: Ma et al., "RoAd" (2024), eq. 4; PEFT
tuners/road/layer.py _get_delta_weight, Linear.merge.
"""

from lora_check.recipes._mixed_rows import apply
from lora_check.recipes._road import METHOD, are_angles, columns, halves_of
from lora_check.types import Factors, Hand, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """R W."""
    from lora_check.functions import plus_product

    (first, second), (x1, x2) = columns(factors, site, hand), halves_of(factors["W"], site)
    turned = plus_product(first * x1, second, x2)
    return {"made": turned.reshape(site.shape[0], -1)}


def fits(site: Site) -> bool:
    """Angles for the outputs of a linear layer."""
    return site.leaf == "weight" and len(site.shape) == 2 and are_angles(site)


RECIPE = Recipe(
    name="road",
    formula="W' = R W",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    apply=apply,
    reads="merged",
    elementwise=frozenset({"theta", "alpha"}),
)

"""b' = b + s b_B.

b     base     (out,)
b_B   factor   (out,), stored as `lora_B.bias` when lora_bias is on

PEFT 0.14 and 0.15 forgot the scale here. Source: PEFT tuners/lora/layer.py Linear.merge.
"""

from lora_check.types import Factors, Numbers, Recipe, Site


def product(factors: Factors, rows: slice) -> Numbers:
    """b_B[rows] as a column."""
    return factors["bias"][rows].reshape(-1, 1)


def fits(site: Site) -> bool:
    """A trained bias of the B factor over a bias of the same length."""
    return set(site.roles) == {"bias"} and site.roles["bias"] == site.shape


RECIPE = Recipe(name="lora-bias", formula="b' = b + s b_B", fits=fits, product=product)

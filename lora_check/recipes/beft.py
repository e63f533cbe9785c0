"""b' = b + v.

b   base     (out,)
v   factor   (1, out), stored as `beft_bias`

The weight is left alone. Source: PEFT tuners/beft/layer.py Linear.merge.
"""

from lora_check.types import Factors, Method, Numbers, Recipe, Site

METHOD = Method(name="BEFT", roles={"beft_bias": "v"}, changes=("bias",))


def product(factors: Factors, rows: slice) -> Numbers:
    """v[rows] as a column."""
    return factors["v"].reshape(-1, 1)[rows]


def fits(site: Site) -> bool:
    """A row as long as the bias of its module."""
    return site.leaf == "bias" and dict(site.roles) == {"v": (1, *site.shape)}


RECIPE = Recipe(
    name="beft", formula="b' = b + v", method=METHOD, fits=fits, product=product, elementwise=frozenset("v")
)

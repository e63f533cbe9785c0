"""b' = b * l, where l scales the outputs.

b   base     (out,)
l   factor   (out, 1), or (1, out, 1...) of a convolution

A feed-forward target scales its inputs and leaves the bias alone. Source: PEFT tuners/ia3/layer.py Linear.merge.
"""

from lora_check.recipes._ia3 import METHOD
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def apply(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """(b * l)[rows] as a column."""
    return w * factors["l"].reshape(-1, 1)[rows]


def fits(site: Site) -> bool:
    """The vector of an ordinary target over its module's bias."""
    if set(site.roles) != {"l"} or site.leaf != "bias":
        return False
    vector, feedforward = site.roles["l"], bool(site.settings.get("feedforward"))
    return vector == (*site.shape, 1) or (len(vector) > 2 and vector[1] == site.shape[0] and not feedforward)


RECIPE = Recipe(
    name="ia3-bias", formula="b' = b * l", method=METHOD, fits=fits, apply=apply, elementwise=frozenset("l")
)

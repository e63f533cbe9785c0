"""W'[o, i, k] = W[o, i, k] + s sum_r B[o, r] A[r, i, k].

W   base     (out, in, k...)     one, two or three kernel dimensions, one group
A   factor   (r, in, k...)
B   factor   (out, r, 1...)

Source: PEFT tuners/lora/layer.py _ConvNd.get_delta_weight.
"""

from lora_check.recipes._low_rank import convolution, is_convolution
from lora_check.types import Recipe, Site


def fits(site: Site) -> bool:
    """A pair of convolution factors over an ungrouped convolution."""
    return set(site.roles) == {"A", "B"} and is_convolution(site)


RECIPE = Recipe(name="lora-conv", formula="W' = W + s sum_r B[:, r] A[r]", fits=fits, product=convolution)

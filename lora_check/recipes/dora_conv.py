"""W'[o] = (m[o] / |V[o]|) V[o],   V[o, i, k] = W[o, i, k] + s sum_r B[o, r] A[r, i, k].

W   base        (out, in, k...)
A   factor      (r, in, k...)
B   factor      (out, r, 1...)
m   magnitude   (1, out, 1...); the norm runs over every dimension but out

Source: PEFT tuners/lora/variants.py _DoraConvNdVariant.merge_safe.
"""

from math import prod

from lora_check.recipes._dora import by_rows
from lora_check.recipes._low_rank import convolution, is_convolution
from lora_check.types import Recipe, Site


def fits(site: Site) -> bool:
    """A pair of convolution factors with a magnitude."""
    return set(site.roles) == {"A", "B", "m"} and is_convolution(site) and prod(site.roles["m"]) == site.shape[0]


RECIPE = Recipe(
    name="dora-conv", formula="W' = m/|W + s B*A| (W + s B*A)", fits=fits, product=convolution, apply=by_rows
)

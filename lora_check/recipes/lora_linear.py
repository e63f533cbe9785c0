"""W' = W + s B A.

W   base     (out, in)
A   factor   (r, in)
B   factor   (out, r)
s   scale    alpha / r, or alpha / sqrt(r) under rsLoRA, multiplied after the product

Source: Hu et al., "LoRA" (2021), eq. 3; PEFT tuners/lora/layer.py Linear.get_delta_weight. MultiheadAttention's
in_proj_weight is merged by the same formula.
"""

from lora_check.recipes._low_rank import in_out, is_out_in, out_in
from lora_check.types import Recipe, Site


def fits(site: Site) -> bool:
    """A plain pair of factors over a weight stored (out, in)."""
    return set(site.roles) == {"A", "B"} and is_out_in(site) and not site.multihead


RECIPE = Recipe(name="lora-linear", formula="W' = W + s B A", fits=fits, product=out_in, flipped=in_out)

"""W' = W + s D, D in k x k blocks of rank r / k.

W   base     (out, in), or (in, out) in a Conv1D of transformers
A   factor   (k, in / k, r), stored as `gralora_A`: one matrix for each block of inputs
B   factor   (k, r, out / k), stored as `gralora_B`: one matrix for each block of outputs
D   matrix   block (j, n) is (A[n][:, part j] B[j][part n, :])^T, the parts being the k equal parts of r
s   scale    alpha / r

Source: Jung et al., "GraLoRA" (2025), section 3; PEFT tuners/gralora/layer.py Linear.get_delta_weight.
"""

from lora_check.recipes._gralora import METHOD, blocks, blocks_fit
from lora_check.recipes._paired import flipped, product
from lora_check.types import Factors, Hand, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """D as one product of two matrices."""
    return blocks(factors, site)


def fits(site: Site) -> bool:
    """Blocks, and nothing beside them."""
    return set(site.roles) == {"A", "B"} and blocks_fit(site) and not site.settings["hybrid_r"]


RECIPE = Recipe(
    name="gralora",
    formula="W' = W + s D",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    flipped=flipped,
)

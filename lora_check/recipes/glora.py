"""W' = W + (W * A + B).

W      base     (out, in), as the adapter found it
A, B   factor   each a product of `glora_A.Xd` (out, r) and `glora_A.Xu` (r, in), a column `glora_A.X` (out, 1), one
                number `glora_A.X` (1,), or `glora_A.zeros` (out, in)

`*` is elementwise. PEFT computes all of it in the model's dtype: each operation is rounded. Source: Chavan et al.,
"One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning" (2023); PEFT tuners/glora/layer.py GloraLayer.merge.
"""

from lora_check.recipes._glora import METHOD, is_product, is_whole, value
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def apply(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """(W + (W0 * A + B))[rows]."""
    scaled = hand.settle(factors["W"] * value(factors, "A", rows, hand))
    return w + hand.settle(scaled + value(factors, "B", rows, hand))


def fits(site: Site) -> bool:
    """The five paths of a linear layer: those of its bias have to be sound as well."""
    if site.leaf != "weight" or len(site.shape) != 2:
        return False
    outputs, inputs = site.shape
    return (
        all(is_product(site, path, site.shape) or is_whole(site, path, site.shape, (outputs, 1), (1,)) for path in "AB")
        and (is_product(site, "C", (inputs, 1)) or is_whole(site, "C", (inputs, 1)))
        and all(is_whole(site, path, (outputs,), (1,)) for path in "DE")
    )


RECIPE = Recipe(name="glora", formula="W' = W + (W * A + B)", method=METHOD, fits=fits, apply=apply, reads="rows")

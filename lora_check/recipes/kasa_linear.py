"""W' = W + s (B * d) A, after W was truncated.

W   base     (out, in), as the recipe kasa-base leaves it
A   factor   (r, in)
B   factor   (out, r)
d   factor   (r,), stored as `lora_diag`; it multiplies the columns of B
s   scale    alpha / r, or alpha / sqrt(r) under rsLoRA, multiplied after the product

PEFT stores the delta in the weight's dtype before it adds it, with safe_merge and without. Source: Wang et al., "KaSA"
(2025); PEFT tuners/lora/variants.py KasaLinearVariant._get_delta_weight.
"""

from lora_check.recipes._low_rank import is_out_in
from lora_check.types import Factors, Numbers, Recipe, Site


def product(factors: Factors, rows: slice) -> Numbers:
    """((B * d) A)[rows]."""
    return (factors["B"][rows] * factors["diag"].reshape(1, -1)) @ factors["A"]


def fits(site: Site) -> bool:
    """A pair of factors with a diagonal between them, over a weight stored (out, in)."""
    roles = site.roles
    return set(roles) == {"A", "B", "diag"} and is_out_in(site) and roles["diag"] == roles["A"][:1]


RECIPE = Recipe(
    name="kasa-linear",
    formula="W' = W + s (B * d) A",
    fits=fits,
    product=product,
    stored=True,
    elementwise=frozenset({"diag"}),
)

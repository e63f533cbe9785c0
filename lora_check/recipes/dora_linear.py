"""W' = (m / |V|_row) V,   V = W + s B A.

W   base        (out, in)
A   factor      (r, in)
B   factor      (out, r)
m   magnitude   (out,)

Source: Liu et al., "DoRA" (2024), eq. 5; PEFT tuners/lora/variants.py DoraLinearVariant.merge_safe.
"""

from lora_check.recipes._dora import by_rows
from lora_check.recipes._low_rank import in_out, is_out_in, out_in
from lora_check.types import Recipe, Site


def fits(site: Site) -> bool:
    """A pair of factors with a magnitude, over a weight stored (out, in)."""
    return set(site.roles) == {"A", "B", "m"} and is_out_in(site) and site.roles["m"] == (site.shape[0],)


RECIPE = Recipe(
    name="dora-linear",
    formula="W' = m/|W + s B A| (W + s B A)",
    fits=fits,
    product=out_in,
    flipped=in_out,
    apply=by_rows,
)

"""W' = V (m / |V|_column),   V = W + s (B A)^T.

W   base        (in, out), as transformers' Conv1D keeps it
A   factor      (r, in)
B   factor      (out, r)
m   magnitude   (out,)

Source: PEFT tuners/lora/variants.py DoraLinearVariant.merge_safe with fan_in_fan_out.
"""

from lora_check.recipes._dora import by_columns, moved
from lora_check.recipes._low_rank import in_out, is_in_out, out_in
from lora_check.types import Recipe, Site


def fits(site: Site) -> bool:
    """A pair of factors with a magnitude, over a weight stored (in, out)."""
    return set(site.roles) == {"A", "B", "m"} and is_in_out(site) and site.roles["m"] == (site.shape[1],)


RECIPE = Recipe(
    name="dora-linear-in-out",
    formula="W' = (W + s (B A)^T) m/|W + s (B A)^T|",
    fits=fits,
    product=in_out,
    flipped=out_in,
    apply=by_columns,
    columns=moved,
)

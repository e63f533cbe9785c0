"""W' = W + s (B A)^T.

W   base     (in, out), as transformers' Conv1D keeps it (GPT-2)
A   factor   (r, in)
B   factor   (out, r)

Decided by how the layer keeps its weight, never by the fan_in_fan_out flag of the configuration alone.
Source: PEFT tuners/lora/layer.py Linear.get_delta_weight with fan_in_fan_out.
"""

from lora_check.recipes._low_rank import in_out, is_in_out, out_in
from lora_check.types import Recipe, Site


def fits(site: Site) -> bool:
    """A plain pair of factors over a weight stored (in, out)."""
    return set(site.roles) == {"A", "B"} and is_in_out(site) and not site.multihead


RECIPE = Recipe(name="lora-linear-in-out", formula="W' = W + s (B A)^T", fits=fits, product=in_out, flipped=out_in)

"""W' = (W + s B A) + s B A.

W   base     (dim, dim): out_proj of nn.MultiheadAttention
A   factor   (r, dim)
B   factor   (dim, r)

PEFT adds this delta twice in every release that supports the layer (0.15 on), in the merge and in the unmerged
forward alike, so the doubled weight is what makes the merged model compute what base plus adapter compute. The first
of the two deltas is stored in the weight's dtype. The second is the plain recipe; the plan pairs both, in this order.
Source: PEFT tuners/lora/layer.py MultiheadAttention.merge.
"""

from lora_check.recipes._low_rank import in_out, is_out_in, out_in
from lora_check.types import Recipe, Site


def fits(site: Site) -> bool:
    """The output projection of a MultiheadAttention that is itself a target."""
    return set(site.roles) == {"A", "B"} and is_out_in(site) and site.multihead


RECIPE = Recipe(name="lora-mha-out", formula="W' = W + 2 s B A", fits=fits, product=out_in, flipped=in_out, stored=True)

"""W' = W + (diag(b) B) (diag(d) A), with the first halves of d and A.

W   base        (out, in), or (in, out) in a Conv1D of transformers
b   factor      (out,), stored as `pvera_lambda_b`
d   factor      (2 r,), stored as `pvera_lambda_d`: r of the mean and r of the logarithm of the variance
A   projection  (2 r, largest in), stored once as `base_model.pvera_A`
B   projection  (largest out, r), stored once as `base_model.pvera_B`

A merge takes the mean alone, as the unmerged model does unless sample_at_inference is on. With save_projection off A
and B are drawn again, as for VeRA; saved ones were rounded to the dtype of the base up to PEFT 0.20. Source: arXiv
2512.07703 (2025); PEFT tuners/pvera/layer.py Linear.get_delta_weight, tuners/pvera/model.py
PveraModel._init_pvera_A_pvera_B.
"""

from lora_check.recipes._vera import fits, method, older, product, scaled_factors
from lora_check.types import Factors, Hand, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The two scaled projections of the mean, cut to the size of the weight."""
    return scaled_factors(factors, site, hand, above=2)


RECIPE = Recipe(
    name="pvera",
    formula="W' = W + (b * B) (d * A)",
    method=method("PVERA"),
    fits=lambda site: fits(site, above=2),
    prepare=prepare,
    product=product,
    anywhere={"PEFT 0.19 and 0.20": older},
)

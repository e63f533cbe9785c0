"""W' = W + (diag(b) B) (diag(d) A).

W   base        (out, in), or (in, out) in a Conv1D of transformers
b   factor      (out,), stored as `vera_lambda_b`
d   factor      (r,), stored as `vera_lambda_d`
A   projection  the first `in` columns of (r, largest in), stored once as `base_model.vera_A`
B   projection  the first `out` rows of (largest out, r), stored once as `base_model.vera_B`

With save_projection off the file lacks A and B: they are drawn again from projection_prng_key, as large as the largest
target wants, and rounded to the dtype of the base. PEFT 0.12 to 0.20 rounded saved ones as well. Source: Kopiczko et
al., "VeRA" (2024), eq. 2; PEFT tuners/vera/layer.py Linear.get_delta_weight, tuners/vera/model.py _kaiming_init.
"""

from lora_check.recipes._vera import fits, method, older, product, scaled_factors
from lora_check.types import Factors, Hand, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The two scaled projections, cut to the size of the weight."""
    return scaled_factors(factors, site, hand, above=1)


RECIPE = Recipe(
    name="vera",
    formula="W' = W + (b * B) (d * A)",
    method=method("VERA"),
    fits=lambda site: fits(site, above=1),
    prepare=prepare,
    product=product,
    anywhere={"PEFT 0.12 to 0.20": older},
)

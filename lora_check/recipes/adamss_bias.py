"""b'[rows_i] = b[rows_i] + (B_i A_i V)[:, -1] for each subspace i: the last column of what the weight moves by.

Source: PEFT tuners/adamss/layer.py Linear.get_delta_bias.
"""

from lora_check.recipes._adamss import METHOD, coefficients, fits, moves
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The products of the small factors, in their rows."""
    return coefficients(factors, site)


def product(factors: Factors, rows: slice) -> Numbers:
    """The last column."""
    return moves(factors, rows)[:, -1:]


RECIPE = Recipe(
    name="adamss-bias",
    formula="b' = b + B_i A_i V in the rows of cluster i",
    method=METHOD,
    fits=lambda site: site.leaf == "bias" and fits(site, site.roles["V"][1] - 1, site.shape[0]),
    prepare=prepare,
    product=product,
    stored=True,
    companions={"W": "weight", "b": "bias"},
)

"""W'[rows_i] = W[rows_i] + B_i A_i V for each subspace i.

W        base    (out, in)
A_i, B_i factor  (r_i, r) and (n_i, r_i), stored as `adamss_A.<i>` and `adamss_B.<i>`
V        factor  (r, in + 1), stored as `adamss_newB`; its last column is that of the bias, and missing without one
rows_i   index   the n_i rows of U in cluster i, where U S V is a seeded low-rank decomposition of [W b] in float32

No file tells the rows. They are clustered again, with scikit-learn if it is installed, and trusted if each cluster is
as large as its B_i says. If not, only a merge that is reproduced bit for bit is verified.
Source: "AdaMSS" (NeurIPS 2025); PEFT tuners/adamss/layer.py AdamssLayer.update_layer,
Linear.get_delta_weight, tuners/adamss/utils.py.
"""

from lora_check.recipes._adamss import METHOD, coefficients, moves
from lora_check.recipes._adamss import fits as _fits
from lora_check.types import Factors, Hand, Numbers, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The products of the small factors, in their rows."""
    return {**coefficients(factors, site), "columns": site.shape[1]}


def product(factors: Factors, rows: slice) -> Numbers:
    """The delta without its bias column."""
    return moves(factors, rows)[:, : factors["columns"]]


def fits(site: Site) -> bool:
    """Subspaces that together own all rows of a linear layer."""
    return site.leaf == "weight" and len(site.shape) == 2 and _fits(site, site.shape[1], site.shape[0])


RECIPE = Recipe(
    name="adamss",
    formula="W' = W + B_i A_i V in the rows of cluster i",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    stored=True,
    companions={"W": "weight", "b": "bias"},
)

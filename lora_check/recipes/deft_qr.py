"""W' = W + Q (k R - Q^T W),   P = Q T with T upper triangular.

W   base     (out, in), or (in, out) in a Conv1D of transformers
P   factor   (out, r), stored as `deft_P`; Q is its orthonormal factor
R   factor   (r, in), stored as `deft_R`; zero under `para`, where the file has none
k   factor   alpha / r, or 1 without alpha

Every adapter sees the base, not what others made of it. PEFT stores the delta in the weight's dtype before adding it.
The same bits as long as LAPACK is the same; another one's are within `functions.orthonormal`, which says nothing sharp
of a weight with many outputs. Source: as for `deft`, with decomposition_method "qr".
"""

from lora_check.recipes._deft import EXACT, METHOD, fits, logical, pair, product
from lora_check.types import Factors, Hand, Recipe, Site


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """`left` and `right`, whose product is the delta as the weight is kept."""
    from lora_check.functions import against, orthonormal

    q = orthonormal(factors["P"])
    return pair(q, against(q, logical(factors["W"], site)), factors, site)


RECIPE = Recipe(
    name="deft-qr",
    formula="W' = W + Q (k R - Q^T W)",
    method=METHOD,
    fits=lambda site: fits(site, "qr"),
    prepare=prepare,
    product=product,
    stored=True,
    reads="whole",
    elementwise=EXACT,
)

"""W' = W + (B D A) * n, D diagonal.

W   base     (out, in)
A   factor   (r, in), stored as `delora_A`
B   factor   (out, r), stored as `delora_B`
λ   factor   (1,), stored as `delora_lambda`: how far all of the delta may go
n   factor   (in,), stored as `delora_w_norm`: the norms of the columns that W had when training began
D   matrix   λ / r / (|A[i, :]| |B[:, i]|), each norm at least 1e-4

`*` is elementwise, by columns. PEFT stores the delta in the weight's dtype before it adds it, with safe_merge and
without. Source: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation" (2025), section 3; PEFT
tuners/delora/layer.py DeloraLayer._compute_delta, DeloraLinear.merge.
"""

from lora_check.types import Factors, Hand, Method, Numbers, Recipe, Site

SHORTEST = 1e-4
"""The norm that PEFT takes for a shorter row or column."""

METHOD = Method(
    name="DELORA",
    roles={"delora_A": "A", "delora_B": "B", "delora_lambda": "strength", "delora_w_norm": "norms"},
    keys=frozenset({"bias", "delora_lambda", "lambda_pattern", "module_dropout", "r", "rank_pattern"}),
)


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """B D, with A and n as they are."""
    from lora_check.ball import norm
    from lora_check.functions import at_least, like

    a, b = factors["A"], factors["B"]
    lengths = at_least(norm(a), SHORTEST) * at_least(norm(b.T), SHORTEST)
    share = factors["strength"] / like(a, float(a.shape[0]))
    return {"left": b * (share / lengths.reshape(-1)), "right": a, "norms": factors["norms"]}


def product(factors: Factors, rows: slice) -> Numbers:
    """((B D A) * n)[rows]."""
    return (factors["left"][rows] @ factors["right"]) * factors["norms"]


def fits(site: Site) -> bool:
    """Two factors of one rank, a number, and one number for each column of a matrix."""
    roles = site.roles
    if set(roles) != {"A", "B", "strength", "norms"} or site.leaf != "weight" or len(site.shape) != 2:
        return False
    a, b = roles["A"], roles["B"]
    ranks = len(a) == len(b) == 2 and a[0] == b[1] and site.shape == (b[0], a[1])
    return ranks and roles["strength"] == (1,) and roles["norms"] == (a[1],)


RECIPE = Recipe(
    name="delora",
    formula="W' = W + (B D A) * n",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    stored=True,
    elementwise=frozenset({"strength", "norms"}),
)

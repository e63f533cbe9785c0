"""W' = W + U S V - U0 S0 V0.

W            base     (out, in)
U, S, V      factor   (out, n), (n,), (n, in), stored as `osf_svd_params.U_low` and so on
U0, S0, V0   SVD      of W in float32, without its k largest singular values, each kept in the dtype of the base;
                      k = min(out, in) - n

PEFT decomposes the base when it loads the adapter. Another LAPACK has other last bits, so only the product is bounded.
PEFT 0.18 to 0.20 put the weight together from all its parts, each rounded to the dtype of the base: the merge of an
adapter that such a release recorded may be either. Source: Nayak et al., "Sculpting Subspaces" (2025), section 3; PEFT
tuners/osf/layer.py OSFLayer.get_delta_weight, tuners/osf/utils.py decompose_weight_matrix.
"""

from collections.abc import Mapping
from typing import Any

from lora_check.types import Factors, Hand, Method, Numbers, Recipe, Site

OLDER = ("0.18.", "0.19.", "0.20.")
"""Releases that merged the rounded parts."""


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """Whether a release with the older merge made the adapter."""
    return {"older": str(raw.get("peft_version") or OLDER[0]).startswith(OLDER)}


METHOD = Method(
    name="OSF",
    roles={"osf_svd_params.U_low": "U", "osf_svd_params.S_low": "values", "osf_svd_params.V_low": "V"},
    keys=frozenset({"effective_rank", "target_svd_config"}),
    settings=settings,
)


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """U S and V, and the product that they replace."""
    from lora_check.decompositions import leading, trailing
    from lora_check.functions import either, storing_error

    def product(u: Numbers, s: Numbers, vt: Numbers) -> Numbers:
        return (hand.settle(u.contiguous()) * hand.settle(s)) @ hand.settle(vt)

    w = factors["W"]
    kept, stored = min(site.shape) - site.roles["values"][0], storing_error(hand.settle, w)
    start = trailing(w, kept, product, stored=stored)
    if site.settings["older"]:
        start = either(start, w - leading(w, kept, product, stored=stored))
    return {"US": factors["U"] * factors["values"].reshape(1, -1), "V": factors["V"], "start": start}


def product(factors: Factors, rows: slice) -> Numbers:
    """(U S V - U0 S0 V0)[rows]."""
    return factors["US"][rows] @ factors["V"] - factors["start"][rows]


def fits(site: Site) -> bool:
    """The smaller singular values and their vectors, fewer than the weight has."""
    roles, shape = site.roles, site.shape
    if set(roles) != {"U", "values", "V"} or site.leaf != "weight" or len(shape) != 2 or len(roles["values"]) != 1:
        return False
    count = roles["values"][0]
    return 0 < count < min(shape) and (roles["U"], roles["V"]) == ((shape[0], count), (count, shape[1]))


RECIPE = Recipe(
    name="osf",
    formula="W' = W + U S V - U0 S0 V0",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    reads="whole",
    elementwise=frozenset({"values"}),
)

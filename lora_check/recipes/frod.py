"""W' = W + (U (S + diag(l)) V^T - W), every operation in the dtype of W.

W   base        (out, in), or (in, out) in a Conv1D of transformers
V   projection  (in, in), stored once for each kind of module as `base_model.frod_V.<kind>`
U   quotient    the columns of W V^-T in float64, each of length 1; kept in float32, then in the dtype of W
S   factor      sparse (in, in): `frod_lambda_s_values` at `base_model.frod_s_indices.<kind>`
l   factor      (in,), stored as `frod_lambda_l`

PEFT divides by the V that it decomposes anew, from all modules of the kind, as it loads the adapter; it multiplies by
the stored one. Both are the same on the machine and in the dtype of the training, and only then is the model the one
that was trained. So U comes of the stored V here, and over a base in another dtype than V's nothing is decided.
Without save_projection V is nowhere, and its signs are left to chance.
Source: "FRoD" (AAAI 2026, doi 10.1609/aaai.v40i31.39813); PEFT tuners/frod/layer.py Linear.get_delta_weight,
FrodLayer._calculate_frod_u_and_lambda.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_check.recipes._sparse import places
from lora_check.types import Factors, Hand, Method, Numbers, Recipe, Site


def refuses(raw: Mapping[str, Any]) -> str:
    """Why V is not known."""
    if raw.get("save_projection", True):
        return ""
    return "save_projection=False: PEFT decomposes the base anew when it loads the adapter, with signs left to chance"


def doubts(site: Site) -> str:
    """Why U is not known: V is stored in the dtype of the training, and another one makes another U."""
    trained = site.dtypes["V"]
    if trained == site.dtype:
        return ""
    return f"trained over {trained} and loaded in {site.dtype}, where PEFT decomposes the base anew into another U"


METHOD = Method(
    name="FROD",
    doubts=doubts,
    roles={"frod_lambda_l": "l", "frod_lambda_s_values": "values"},
    shared={"frod_V": "V", "frod_s_indices": "indices", "frod_s_size": "size"},
    keys=frozenset(
        {
            "bias",
            "frod_dropout",
            "progressbar",
            "projection_prng_key",
            "regularization_alpha",
            "runtime_offload_base_weight",
            "save_projection",
            "sparse_rate",
        }
    ),
    refuses=refuses,
)

LEAST = 1e-12
"""Shorter columns of U are left at zero, as PEFT does."""


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The two factors of U (S + diag(l)) V^T, or of its transpose where the weight is kept (in, out), and W."""
    w = factors["W"].T if site.in_out else factors["W"]
    v = hand.settle(factors["V"])
    left = hand.settle(hand.settle(_quotient(w, v)) @ _core(factors, site, hand))
    pair = {"left": v, "right": left.T} if site.in_out else {"left": left, "right": v.T}
    return {**pair, "W": factors["W"]}


def _core(factors: Factors, site: Site, hand: Hand) -> Numbers:
    """S + diag(l); S has nothing on its diagonal.

    raises   CorruptCheckpointError: indices beyond the matrix
    """
    import torch

    from lora_check.functions import joined

    rows, columns = places(factors["indices"], int(factors["l"].shape[0]), site)

    def placed(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        values, diagonal = parts
        return torch.diag(diagonal).index_put_((rows, columns), values)

    return joined([hand.settle(factors["values"]), hand.settle(factors["l"])], placed)


def _quotient(w: Numbers, v: Numbers) -> Numbers:
    """The columns of W V^-T, each of length 1."""
    from lora_check.ball import norm
    from lora_check.functions import chosen, in_double, in_single, like, middle, solved

    found = solved(in_double(v), in_double(w.T))
    lengths = norm(found)
    known = middle(lengths) > LEAST
    units = found / chosen(known, lengths, like(lengths, 1.0))
    return in_single(chosen(known, units, like(found, 0.0)), w).T


def apply(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """W[rows] + (U (S + diag(l)) V^T - W)[rows], the difference taken from the base as it was found."""
    return w + hand.settle(hand.settle(factors["left"][rows] @ factors["right"]) - factors["W"][rows])


def fits(site: Site) -> bool:
    """A square projection as wide as the weight, the places of a sparse matrix and a diagonal."""
    roles = site.roles
    if set(roles) != {"l", "values", "V", "indices", "size"} or site.leaf != "weight" or len(site.shape) != 2:
        return False
    width = site.shape[0] if site.in_out else site.shape[1]
    places = (2, *roles["values"])
    return roles["V"] == (width, width) and roles["l"] == (width,) and roles["indices"] == places


RECIPE = Recipe(
    name="frod",
    formula="W' = W + (U (S + diag(l)) V^T - W)",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    apply=apply,
    reads="whole",
    elementwise=frozenset({"values", "l", "V"}),
)

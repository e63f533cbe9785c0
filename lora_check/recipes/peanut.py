"""W' = W + k (f(W^T) B^T)^T, where f is a small network over the columns of W.

W       base      (out, in)
A       factor    (r, out), stored as `peanut_A`: f begins with x = act(W^T A^T), (in, r)
E_i     factor    (r, r), stored as `peanut_encoders.<i>`: x = act(x E_i^T), for i = 0 to depth - 1
D_i     factor    (r, r), stored as `peanut_decoders.<i>`: x = act(x D_i^T) + what E_(depth - 1 - i) was given
B       factor    (out, r), stored as `peanut_B`
k       factor    the configuration's `scaling`; act its `act_fn`

Every adapter sees the base, not what others made of it. PEFT stores the delta in the weight's dtype before adding it.
Source: arXiv 2410.01870 (2024); PEFT tuners/peanut/layer.py Linear._compute_delta_weight.
"""

from collections.abc import Mapping
from typing import Any

from lora_check.recipes._activations import ACTIVATIONS, activated
from lora_check.types import Factors, Hand, Method, Numbers, Recipe, Site


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """Depth, activation and k; PEFT's defaults where the configuration is silent."""
    scale = raw.get("scaling")
    return {"depth": int(raw.get("depth") or 0), "act": _act(raw), "k": 1.0 if scale is None else float(scale)}


def refuses(raw: Mapping[str, Any]) -> str:
    """Activations that are not modelled."""
    return "" if _act(raw) in ACTIVATIONS else f"the activation {_act(raw)!r} is not recomputed by this version"


def _act(raw: Mapping[str, Any]) -> str:
    return str(raw.get("act_fn") or "relu")


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """What the network makes of the columns of W (in, r)."""
    depth, act = site.settings["depth"], site.settings["act"]
    x = activated(factors["W"].T @ factors["A"].T, act)
    given = []
    for i in range(depth):
        given.append(x)
        x = activated(x @ factors[f"encoder_{i}"].T, act)
    for i in range(depth):
        x = activated(x @ factors[f"decoder_{i}"].T, act) + given[depth - 1 - i]
    return {"x": x, "B": factors["B"], "k": site.settings["k"]}


def product(factors: Factors, rows: slice) -> Numbers:
    """The delta's rows."""
    return ((factors["x"] @ factors["B"][rows].T) * factors["k"]).T


def fits(site: Site) -> bool:
    """Factors as wide as the weight has outputs, and as many layers as the configuration says."""
    roles, shape = site.roles, site.shape
    if site.leaf != "weight" or site.in_out or len(shape) != 2 or len(roles.get("A", ())) != 2:
        return False
    rank = roles["A"][0]
    layers = {f"{kind}_{i}": (rank, rank) for kind in ("encoder", "decoder") for i in range(site.settings["depth"])}
    return dict(roles) == {"A": (rank, shape[0]), "B": (shape[0], rank), **layers}


METHOD = Method(
    name="PEANUT",
    roles={
        "peanut_A": "A",
        "peanut_B": "B",
        "peanut_encoders.*": "encoder_*",
        "peanut_decoders.*": "decoder_*",
    },
    keys=frozenset({"act_fn", "depth", "scaling"}),
    settings=settings,
    refuses=refuses,
)
RECIPE = Recipe(
    name="peanut",
    formula="W' = W + k (f(W^T) B^T)^T",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    stored=True,
    reads="whole",
    # Tensor cores would cut W short as well as A, which costs more than most deltas are large: not taken for honest.
    elementwise=frozenset("A"),
)

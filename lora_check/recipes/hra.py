"""W' = W H.

W   base      (out, in), or a convolution flattened to (out, in k k)
u   factor    (in, r), stored as `hra_u`, each column divided by its norm
H   rotation  (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T); with apply_GS, which makes the columns orthogonal one after the
              other, I - 2 U U^T

PEFT forms H, in x in numbers, before it multiplies: not bit for bit in fp32. Source: Yuan et al., "Bridging The Gap
between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation" (2024), eq. 4; PEFT
tuners/hra/layer.py HRALinear.get_delta_weight.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from lora_check.recipes._hra import mirror, mirrored, reflected, reflections
from lora_check.types import Factors, Hand, Method, Numbers, Recipe, Site


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """Whether the columns are made orthogonal first."""
    return {"orthogonal": bool(raw.get("apply_GS"))}


METHOD = Method(name="HRA", roles={"hra_u": "u"}, keys=frozenset({"apply_GS", "bias"}), settings=settings)


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """What the rows are reflected by."""
    return mirror(factors["u"]) if site.settings["orthogonal"] else reflections(factors["u"])


def apply(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """(W H)[rows]."""
    return mirrored(w, factors) if "q" in factors else reflected(w, factors)


def fits(site: Site) -> bool:
    """Columns as long as the rows of the weight."""
    u = site.roles.get("u", ())
    plain = set(site.roles) == {"u"} and site.leaf == "weight" and len(site.shape) in (2, 4)
    return plain and len(u) == 2 and u[0] == prod(site.shape[1:])


RECIPE = Recipe(
    name="hra",
    formula="W' = W H",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    apply=apply,
    # Tensor cores would round H, W and u in every product: no bound of that leaves anything to tell.
    elementwise=frozenset("u"),
)

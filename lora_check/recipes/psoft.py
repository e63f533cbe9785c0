"""W' = W + U_r S_r (R - I) V_r^T, written as s B (R - I) A.

W          base    (out, in)
U, S, V    SVD     of W in float32, its r largest singular values; A = V^T and B = U S / s, or the root of S / s in both
                   where ab_svd_init is "pissa_init"
R          factor  (r, r): diag(b) (I + Q) (I - Q)^-1 diag(a), or the Neumann series I + 2 Q + 2 Q^2 + ... + Q^(t-1)
Q          factor  (r (r - 1) / 2,), stored as `psoft_R.weight`: the upper triangle, row by row, of a skew matrix;
                   without psoft_orth it is (r, r) and R itself
a, b       factor  (r,), stored as `psoft_R.vector_a` and `psoft_R.vector_b`; either may be missing
s          scale   psoft_alpha / r

With cayley_neumann_eps, Q is first shortened to that Frobenius norm. The signs of the singular vectors count, and no
rule fixes them: PEFT takes those of the machine that loads the adapter, and they are read off the merged tensor, one
for each pair of vectors. Another LAPACK has other last bits. The random projection of psoft_svd="lowrank" is another on
another kind of device: it is drawn as on a CPU, and only a merge that is reproduced bit for bit is verified.
Source: "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation" (openreview FSHrinMArK); PEFT
tuners/psoft/layer.py PsoftLayer._compute_svd_factors, OrthLayer.get_matrix, Linear.get_delta_weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_check.recipes._oft import series, skew
from lora_check.types import Factors, Hand, LoadedStep, Method, Numbers, Recipe, Site

if TYPE_CHECKING:
    from torch import Tensor


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """How R and the factors are made, with PEFT's defaults where the configuration is silent."""
    return {
        "rank": int(raw["r"]),
        "scale": float(raw["psoft_alpha"]) / int(raw["r"]),
        "iterations": None if raw.get("psoft_svd") != "lowrank" else int(raw.get("psoft_svd_lowrank_niter") or 0),
        "seed": int(raw.get("random_seed") or 0),
        "symmetric": raw.get("ab_svd_init") == "pissa_init",
        "skew": bool(raw.get("psoft_orth", True)),
        "vectors": {one for one in "ab" if raw.get(f"psoft_mag_{one}", True)},
        "terms": int(raw.get("num_cayley_neumann_terms") or 5) if raw.get("use_cayley_neumann") else 0,
        "eps": float(raw.get("cayley_neumann_eps") or 0.0) if raw.get("use_cayley_neumann") else 0.0,
    }


def refuses(raw: Mapping[str, Any]) -> str:
    """Why A and B cannot be made again."""
    if raw.get("psoft_svd", "full") not in ("full", "lowrank"):
        return f"psoft_svd={raw['psoft_svd']!r} is not known to this version"
    if raw.get("psoft_svd") == "lowrank" and raw.get("random_seed") is None:
        return "psoft_svd='lowrank' without random_seed draws an unseeded random projection (PEFT 0.19)"
    return "" if raw.get("psoft_alpha") and raw.get("r") else "the configuration does not say psoft_alpha and r"


METHOD = Method(
    name="PSOFT",
    roles={"psoft_R.vector_a": "a", "psoft_R.vector_b": "b", "psoft_R": "Q"},
    keys=frozenset(
        {
            "ab_svd_init",
            "cayley_neumann_eps",
            "num_cayley_neumann_terms",
            "psoft_dropout",
            "psoft_mag_a",
            "psoft_mag_b",
            "psoft_orth",
            "psoft_svd",
            "psoft_svd_lowrank_niter",
            "random_seed",
            "use_cayley_neumann",
        }
    ),
    alpha="psoft_alpha",
    settings=settings,
    refuses=refuses,
)


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """B (R - I) and A."""
    import torch

    from lora_check.functions import identity, like, square_root

    u, s, vt = _decomposed(factors["W"], site)
    signs = like(u, torch.tensor(site.settings.get("signs") or [1.0] * site.settings["rank"]))
    u, vt = u * signs, signs.reshape(-1, 1) * vt
    s = s / like(s, site.settings["scale"])
    turn = _transformation(factors, site)
    if site.settings["symmetric"]:
        root = square_root(s)
        u, s, vt = u, root, root.reshape(-1, 1) * vt
    return {"left": (u * s) @ (turn - identity(turn)), "A": vt, "known": site.settings["iterations"] is None}


def _decomposed(w: Numbers, site: Site) -> tuple[Numbers, Numbers, Numbers]:
    """U_r, S_r and V_r^T."""
    import torch

    from lora_check.decompositions import seeded_low_rank, singular
    from lora_check.functions import like, middle

    said = site.settings
    if said["iterations"] is None:
        return singular(w, said["rank"])
    u, s, vt = seeded_low_rank(middle(w).to(torch.float32), said["rank"], said["iterations"], said["seed"])
    return like(w, u), like(w, s), like(w, vt)


def product(factors: Factors, rows: slice) -> Numbers:
    """(B (R - I) A)[rows]; as a ball, anything, where the projection was a random one."""
    from lora_check.functions import anything

    found = factors["left"][rows] @ factors["A"]
    return found if factors["known"] else anything(found)


def _transformation(factors: Factors, site: Site) -> Numbers:
    """R."""
    turn = _turn(skew(factors["Q"].reshape(1, -1))[0], site) if site.settings["skew"] else factors["Q"]
    if "b" in factors:
        turn = factors["b"].reshape(-1, 1) * turn
    return turn * factors["a"].reshape(1, -1) if "a" in factors else turn


def _turn(skew: Numbers, site: Site) -> Numbers:
    """(I + Q) (I - Q)^-1, or its series."""
    from lora_check.functions import identity, solved

    if not site.settings["terms"]:
        return solved(identity(skew) - skew, identity(skew) + skew, left=False)
    short = _shortened(skew, site.settings["eps"]) if site.settings["eps"] else skew
    return series(short, site.settings["terms"], 1.0)


def _shortened(skew: Numbers, eps: float) -> Numbers:
    """Q min(1, eps / |Q|): the smaller of two numbers is no further off than they are."""
    from lora_check.ball import norm
    from lora_check.functions import like, moved

    length = norm(skew.reshape(1, -1))
    shrunk = like(length, 1.0) / (length + like(length, 1e-12)) * eps
    return skew * moved(shrunk, lambda x: x.clamp_max(1.0))


def settled(step: LoadedStep, base: Tensor, merged: Tensor) -> LoadedStep:
    """The step with the signs under which the merged tensor holds most of its delta.

    U^T (W' - W) V is T = S (R - I) but for d_i d_j of the signs d: they are those of the first eigenvector of T times
    that, element by element. Where the signs of this machine fit as well, or fit a delta subtracted, they stay.
    """
    import torch

    from lora_check.decompositions import singular
    from lora_check.functions import identity

    assert step.site is not None
    if step.site.settings["iterations"] is not None or not bool(merged.isfinite().all()):
        return step
    w = base.to(merged.dtype).to(torch.float32)
    u, s, vt = singular(w, step.site.settings["rank"])
    turn = _transformation({role: factor.to(torch.float32) for role, factor in step.factors.items()}, step.site)
    known, root = turn - identity(turn), s.sqrt()
    known = root[:, None] * known * root if step.site.settings["symmetric"] else s[:, None] * known
    seen = u.T @ (merged.to(torch.float32) - w) @ vt.T
    agreement = (seen * known + (seen * known).T).fill_diagonal_(0.0)
    if not bool(agreement.isfinite().all()):
        return step
    signs = torch.where(torch.linalg.eigh(agreement).eigenvectors[:, -1] < 0, -1.0, 1.0)
    if not signs @ agreement @ signs > agreement.sum().abs():
        return step
    return replace(step, site=replace(step.site, settings={**step.site.settings, "signs": signs.tolist()}))


def fits(site: Site) -> bool:
    """The numbers of one small matrix, with the vectors that the configuration says."""
    said, roles = site.settings, site.roles
    if site.leaf != "weight" or len(site.shape) != 2 or set(roles) != {"Q", *said["vectors"]}:
        return False
    rank = said["rank"]
    packed = (rank * (rank - 1) // 2,) if said["skew"] else (rank, rank)
    return roles["Q"] == packed and all(roles[one] == (rank,) for one in said["vectors"]) and rank <= min(site.shape)


RECIPE = Recipe(
    name="psoft",
    formula="W' = W + U_r S_r (R - I) V_r^T",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    stored=True,
    reads="whole",
    settled=settled,
    elementwise=frozenset("ab"),
)

"""AdaMSS's names, and the rows that its subspaces own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lora_check.types import Factors, Method, Numbers, Site

if TYPE_CHECKING:
    from torch import Tensor

ITERATIONS = 2
CLUSTERINGS = {"init": "random", "n_init": 1, "max_iter": 10, "random_state": 123456789}
"""What PEFT asks of torch.svd_lowrank and of scikit-learn's KMeans."""


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """The seed of the projection and the number of clusters."""
    return {"seed": int(raw["random_seed"]), "clusters": int(raw.get("num_subspaces") or 5)}


def refuses(raw: Mapping[str, Any]) -> str:
    """Why the rows cannot be told."""
    if raw.get("random_seed") is None:
        return "its rows were clustered after an unseeded random projection (PEFT 0.19)"
    if find_spec("sklearn") is None:
        return "its rows are clusters that scikit-learn finds, and scikit-learn is not installed"
    return ""


METHOD = Method(
    name="ADAMSS",
    roles={"adamss_A.*": "A*", "adamss_B.*": "B*", "adamss_newB": "V"},
    keys=frozenset(
        {
            "asa_importance_beta",
            "asa_schedule_exponent",
            "asa_target_subspaces",
            "asa_uncertainty_beta",
            "final_warmup",
            "init_warmup",
            "mask_interval",
            "num_subspaces",
            "r",
            "random_seed",
            "subspace_rank",
            "svd_threshold",
            "use_asa",
            "use_dynamic_rank",
        }
    ),
    settings=settings,
    refuses=refuses,
)


def coefficients(factors: Factors, site: Site) -> Factors:
    """B_i A_i in the rows of each subspace i, (out, r); and whether the clusters are as large as the adapter's.

    Where they are not, the rows are laid out in order, which is a guess.
    """
    import torch

    from lora_check.functions import joined, middle

    count = site.settings["clusters"]
    products = [factors[f"B{i}"] @ factors[f"A{i}"] for i in range(count)]
    weight, bias = middle(factors["W"]), factors.get("b")
    base = weight if bias is None else torch.cat((weight, middle(bias).unsqueeze(1)), dim=1)
    labels = _clusters(base.to(torch.float32), int(factors["V"].shape[0]), site)
    order = torch.cat([torch.where(labels == i)[0] for i in range(count)])
    known = [int((labels == i).sum()) for i in range(count)] == [int(one.shape[0]) for one in products]
    place = torch.argsort(order) if known else torch.arange(len(order))
    placed = joined(products, lambda parts: torch.cat(list(parts))[place])
    return {"C": placed, "V": factors["V"], "known": known}


def _clusters(base: Tensor, rank: int, site: Site) -> Tensor:
    """The cluster of each row of the left singular vectors."""
    import torch
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]

    from lora_check.decompositions import seeded_low_rank

    u, _, _ = seeded_low_rank(base, rank, ITERATIONS, site.settings["seed"])
    labels = KMeans(n_clusters=site.settings["clusters"], **CLUSTERINGS).fit_predict(u.numpy())
    return torch.from_numpy(labels).long()


def moves(factors: Factors, rows: slice) -> Numbers:
    """(C V)[rows]; as a ball, anything, where the rows are not known to be these."""
    from lora_check.functions import anything

    found = factors["C"][rows] @ factors["V"]
    return found if factors["known"] else anything(found)


def fits(site: Site, width: int, height: int) -> bool:
    """A pair of factors for each cluster that together have as many rows as the weight."""
    roles, count = site.roles, min(site.settings["clusters"], height)
    pairs = {f"{letter}{i}" for letter in "AB" for i in range(count)}
    if count != site.settings["clusters"] or set(roles) != {"V", *pairs} or len(roles["V"]) != 2:
        return False
    rank = roles["V"][0]
    shapes = [(roles[f"A{i}"], roles[f"B{i}"]) for i in range(count)]
    alike = all(len(b) == 2 and a == (b[1], rank) for a, b in shapes)
    return alike and sum(b[0] for _, b in shapes) == height and roles["V"][1] in (width, width + 1)

"""W' = W + B A,   A = theta[i] * f,   B = theta[j] * g.

W      base     (out, in), or (in, out) in a Conv1D of transformers
theta  bank     (d,), stored once as `base_model.unilora_theta_d`
i, j   indices  (r, in) and (out, r), stored as `unilora_indices_A` and `unilora_indices_B`
f, g   scales   of the same shapes, stored as `unilora_scales_A` and `unilora_scales_B`

With save_indices off the file lacks indices and scales. PEFT then deals them out over all target modules in the order
in which the model defines them, and no file tells that order. Source: "Uni-LoRA: One Vector is All You Need" (2025);
PEFT tuners/unilora/layer.py Linear.get_delta_weight, tuners/unilora/model.py
UniLoraModel._assign_unilora_indices_and_scales.
"""

from collections.abc import Mapping
from typing import Any

from lora_check.errors import CorruptCheckpointError
from lora_check.types import Factors, Hand, Method, Numbers, Recipe, Site


def refuses(raw: Mapping[str, Any]) -> str:
    """Adapters without their indices."""
    if raw.get("save_indices"):
        return ""
    return (
        "save_indices is off, and PEFT deals out the indices in the order in which the model defines its modules, "
        "which no file tells: save the adapter again with save_indices=True"
    )


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """`left` and `right`, whose product is the delta as the weight is kept."""
    a, b = (_looked_up(factors, site, one) for one in "AB")
    return {"left": a.T, "right": b.T} if site.in_out else {"left": b, "right": a}


def _looked_up(factors: Factors, site: Site, name: str) -> Numbers:
    """theta[indices] * scales.

    raises   CorruptCheckpointError: an index that theta does not have
    """
    from lora_check.functions import middle, moved

    index, length = middle(factors[f"indices_{name}"]), site.roles["theta"][0]
    if index.is_floating_point() or not bool(((index >= 0) & (index < length)).all()):
        raise CorruptCheckpointError(
            f"unilora_indices_{name} of {site.parameter} points beyond the {length} numbers of unilora_theta_d",
            hint="save the adapter again with save_pretrained",
        )
    return moved(factors["theta"], lambda theta: theta[index.long()]) * factors[f"scales_{name}"]


def product(factors: Factors, rows: slice) -> Numbers:
    """(left right)[rows]."""
    return factors["left"][rows] @ factors["right"]


def fits(site: Site) -> bool:
    """A bank, and for each of A and B an index and a scale for every element."""
    roles = site.roles
    if site.leaf != "weight" or len(site.shape) != 2 or len(roles.get("theta", ())) != 1:
        return False
    rows, columns = site.shape[::-1] if site.in_out else site.shape
    rank = roles.get("indices_A", (0,))[0]
    wanted = {"A": (rank, columns), "B": (rows, rank)}
    shapes = {f"{kind}_{one}": shape for kind in ("indices", "scales") for one, shape in wanted.items()}
    return dict(roles) == {"theta": roles["theta"], **shapes}


METHOD = Method(
    name="UNILORA",
    roles={f"unilora_{kind}_{one}": f"{kind}_{one}" for kind in ("indices", "scales") for one in "AB"},
    shared={"unilora_theta_d": "theta"},
    keys=frozenset({"bias", "init_theta_d_bound", "proj_seed", "save_indices", "theta_d_length", "unilora_dropout"}),
    refuses=refuses,
)
RECIPE = Recipe(
    name="unilora",
    formula="W' = W + (theta[j] g) (theta[i] f)",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
)

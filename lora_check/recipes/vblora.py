"""W' = W + B A, both put together from shared vectors.

W      base     (out, in), or (in, out) in a Conv1D of transformers
bank   factor   (vectors, v), stored once as `base_model.vblora_vector_bank`
A      matrix   (r, in): each v of its elements are a weighted sum of the k vectors with the largest logits
B      matrix   (out, r): the same for each v elements of its columns
logits factors  (r, in / v, vectors) and (out / v, r, vectors), stored as `vblora_logits_A` and `vblora_logits_B`; the
                weights are the softmax of the k = topk largest

With save_only_topk_weights the file holds `vblora_logits_A_topk_indices` (r, in / v, k) and, of all weights but the
last, `vblora_logits_A_topk_weights` (r, in / v, k - 1), and so for B: PEFT takes logarithms and the softmax again.
Source: Li et al., "VB-LoRA" (2024), section 3; PEFT tuners/vblora/layer.py Linear._get_lora_matrices,
tuners/vblora/model.py VBLoRAModel._remap_adapter_state_dict_for_load.
"""

from collections.abc import Mapping
from typing import Any

from lora_check.errors import CorruptCheckpointError
from lora_check.recipes._numbers import whole
from lora_check.recipes._paired import flipped, is_turned, pair, product
from lora_check.types import Factors, Hand, Method, Numbers, Recipe, Site


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """How many vectors are mixed."""
    return {"topk": whole(raw, "topk", 2, least=1)}


METHOD = Method(
    name="VBLORA",
    roles={
        f"vblora_logits_{side}{stored}": f"{role}_{side}"
        for side in "AB"
        for stored, role in (("", "logits"), ("_topk_indices", "indices"), ("_topk_weights", "weights"))
    },
    shared={"vblora_vector_bank": "bank"},
    keys=frozenset(
        {
            "bias",
            "init_logits_std",
            "init_vector_bank_bound",
            "num_vectors",
            "r",
            "save_only_topk_weights",
            "topk",
            "vblora_dropout",
            "vector_length",
        }
    ),
    settings=settings,
)
LOGITS = {"logits_A", "logits_B"}
LARGEST = {"indices_A", "indices_B", "weights_A", "weights_B"}


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """B (out, r) and A (r, in)."""
    from lora_check.functions import moved

    a, b = (_vectors(factors, side, site) for side in "AB")
    return pair(moved(b, lambda x: x.mT.reshape(-1, x.shape[1])), moved(a, lambda x: x.flatten(1)), site)


def _vectors(factors: Factors, side: str, site: Site) -> Numbers:
    """The mixed vectors (.., .., v) of one matrix."""
    from lora_check.functions import attended, weighted

    if f"logits_{side}" in factors:
        return attended(factors[f"logits_{side}"], factors["bank"], site.settings["topk"])
    index, vectors = factors[f"indices_{side}"].long(), int(factors["bank"].shape[0])
    if not bool(((index >= 0) & (index < vectors)).all()):
        raise CorruptCheckpointError(
            f"vblora_logits_{side}_topk_indices of {site.parameter} name vectors beyond the {vectors} of the bank",
            hint="save the adapter again, or fetch it anew",
        )
    weights, order = _restored(factors[f"weights_{side}"])
    return weighted(weights, factors["bank"][index.gather(-1, order)])


def _restored(stored: Numbers) -> tuple[Numbers, Any]:
    """All weights, largest first, and where each was: the last of them is what the others leave of 1.

    A producer that rounds what it loads rounds the logarithms, not the weights; balls allow for either.
    """
    import torch

    from lora_check.ball import Ball
    from lora_check.functions import at_least, joined, like, middle, moved, rounded_to, softmax_of_log, total
    from lora_check.rounding import UNDERFLOW

    unit = rounded_to(stored) if isinstance(stored, Ball) else 0.0
    known = stored.widened(unit) if isinstance(stored, Ball) else stored
    last = like(known, 1.0) - moved(total(known, -1), lambda x: x[..., None])
    weights = joined([known, at_least(last, UNDERFLOW)], lambda parts: torch.cat(list(parts), -1))
    order = middle(weights).argsort(stable=True, dim=-1, descending=True)
    return softmax_of_log(moved(weights, lambda x: x.gather(-1, order)), unit), order


def fits(site: Site) -> bool:
    """Logits, or indices and weights, of as many pieces as the weight has, and the vectors they mix."""
    roles, bank = site.roles, site.roles.get("bank", ())
    if roles.keys() - {"bank"} not in (LOGITS, LARGEST) or len(bank) != 2:
        return False
    a, b = (_pieces(roles, side, bank[0], site.settings["topk"]) for side in "AB")
    return bool(a and b) and a[0] == b[1] and is_turned(site, b[0] * bank[1], a[1] * bank[1]) is not None


def _pieces(roles: Mapping[str, tuple[int, ...]], side: str, vectors: int, topk: int) -> tuple[int, ...]:
    """How many mixed vectors each axis has; nothing if the shapes contradict themselves or the configuration."""
    if f"logits_{side}" in roles:
        shape, known = roles[f"logits_{side}"], topk <= vectors
        return shape[:2] if known and shape[2:] == (vectors,) else ()
    shape = roles[f"indices_{side}"]
    return shape[:2] if shape[2:] == (topk,) and roles[f"weights_{side}"] == (*shape[:2], topk - 1) else ()


RECIPE = Recipe(
    name="vblora",
    formula="W' = W + B A of mixed vectors",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    flipped=flipped,
    elementwise=frozenset(LOGITS | LARGEST),
)

"""W' = W + B R A,   R = the sum over i of v[i] P[i].

W   base     (out, in), (in, out) in a Conv1D of transformers, or an embedding (vocab, dim)
A   factor   (r, in), stored as `tinylora_A`: from the singular vectors of W, as B is; neither is trained
B   factor   (out, r), stored as `tinylora_B`
v   factor   (u,), stored once for each group of modules as `base_model.tinylora_v.<group>`: all that is trained
P   factor   (u, r, r), stored as `tinylora_P`: normal, of variance 1 / r, drawn from projection_seed + place

A group is a run of modules in the order of the model, and neither that order nor the group is in the files. Where the
targets differ in the numbers of their paths alone, that is their order; elsewhere a saved P tells the place that it was
drawn for. Without P (save_projection off) only such numbered targets, or a single one, can be recomputed: P is drawn
again and rounded to the dtype of the base. PEFT 0.19 drew P from a number that changes from run to run: its P tells no
place, and cannot be drawn again. Source: "Learning to Reason in 13 Parameters" (2026), arXiv:2602.04118; PEFT
tuners/tinylora/layer.py TinyLoraLayer.get_delta_weight, tuners/tinylora/model.py TinyLoraModel._create_and_replace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lora_check.errors import InputError
from lora_check.recipes._numbers import real, whole
from lora_check.recipes._paired import flipped, is_turned, pair, product
from lora_check.types import Factors, Hand, Method, Numbers, Recipe, Site

if TYPE_CHECKING:
    from torch import Tensor


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """The seed, the size of the groups, and the module's place among the targets, where their names tell it.

    raises   ValueError: P or the group is needed, and nothing tells the place
    """
    place, count = _places(targets).get(module), len(targets)
    groups = max(1, round(count * (1.0 - real(raw, "weight_tying", 0.0))))
    saved = raw.get("save_projection") is not False
    if str(raw.get("peft_version") or "").startswith("0.19"):
        _refuse_in_0_19(saved, known=place is not None or groups == 1)
    elif not saved and place is None:
        raise ValueError(
            "P is not saved, and the files do not tell the order of the modules by which it is drawn again"
        )
    return {
        "seed": whole(raw, "projection_seed", 42),
        "saved": saved,
        "count": count,
        "groups": groups,
        "size": max(1, count // groups),
        "place": place,
    }


def _refuse_in_0_19(saved: bool, *, known: bool) -> None:
    if not saved:
        raise ValueError("P is not saved, and PEFT 0.19 draws another one in each run")
    if not known:
        raise ValueError("PEFT 0.19 draws the same P for all modules, so that nothing tells which vector is whose")


def _places(targets: Iterable[str]) -> Mapping[str, int]:
    """The places of modules that lie in numbered lists and are otherwise named alike; of none, if they do not."""
    paths = {module: module.split(".") for module in targets}
    numbers = {module: [int(one) for one in path if one.isdecimal()] for module, path in paths.items()}
    alike = {tuple(one if not one.isdecimal() else "" for one in path) for path in paths.values()}
    ordered = sorted(numbers, key=numbers.__getitem__) if len(alike) == 1 else []
    return {module: place for place, module in enumerate(ordered)}


METHOD = Method(
    name="TINYLORA",
    roles={"tinylora_A": "A", "tinylora_B": "B", "tinylora_P": "P"},
    shared={"tinylora_v.*": "v.*"},
    keys=frozenset(
        {"bias", "init_v_bound", "projection_seed", "save_projection", "tinylora_dropout", "u", "weight_tying"}
    ),
    settings=settings,
)


def prepare(factors: Factors, site: Site, hand: Hand) -> Factors:
    """B R and A."""
    from lora_check.functions import like, moved

    told, u, r = site.settings, _length(site), int(factors["A"].shape[0])
    place = told["place"]
    if _is_read(site):
        p = factors["P"]
        place = _found(p, site) if place is None and told["groups"] > 1 else place or 0
    else:
        p = hand.settle(like(factors["A"], _drawn(told["seed"] + place, 1, u, r)[0]))
    v = factors[f"v.{min(place // told['size'], told['groups'] - 1)}"]
    # A batch of one, for torch sums small ones in another order than a plain product, and its einsum makes batches.
    mixed = v.reshape(1, 1, u) @ p.reshape(1, u, r * r)
    return pair(factors["B"] @ hand.keep(moved(mixed, lambda x: x.reshape(r, r))), factors["A"], site)


def _is_read(site: Site) -> bool:
    """Whether PEFT takes P from the file."""
    return "P" in site.roles and bool(site.settings["saved"])


def _found(p: Numbers, site: Site) -> int:
    """The place whose projections these are, up to the rounding of a model in 16 bits.

    raises   InputError: they are those of none, or of several
    """
    import torch

    from lora_check.functions import middle
    from lora_check.rounding import unit

    stored, told = middle(p), site.settings
    drawn = _drawn(told["seed"], told["count"], *stored.shape[:2]).to(stored.dtype)
    near = torch.isclose(stored, drawn, rtol=unit("bfloat16"), atol=0.0).flatten(1).all(1).nonzero().flatten().tolist()
    if len(near) != 1:
        raise InputError(
            f"tinylora_P of {site.parameter} does not tell which of the modules it was drawn for",
            hint="with projection_seed as in training, each module's projections are drawn from the seed and its place",
        )
    return int(near[0])


@lru_cache(maxsize=4)
def _drawn(seed: int, count: int, u: int, r: int) -> Tensor:
    """P of the first places from a seed on, by torch's generator for CPUs (count, u, r, r)."""
    import torch

    return torch.stack(
        [
            torch.normal(0.0, 1.0 / r**0.5, size=(u, r, r), generator=torch.Generator().manual_seed(seed + place))
            for place in range(count)
        ]
    )


def _length(site: Site) -> int:
    return site.roles["v.0"][0]


def fits(site: Site) -> bool:
    """Two factors, a vector for each group, and projections or a place for which they can be drawn."""
    roles, vectors = site.roles, {role for role in site.roles if role.startswith("v.")}
    a, b = roles.get("A", ()), roles.get("B", ())
    if roles.keys() - vectors - {"P"} != {"A", "B"} or len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        return False
    if vectors != {f"v.{group}" for group in range(site.settings["groups"])}:
        return False
    (u, *more), others = roles["v.0"], {roles[one] for one in vectors}
    known = roles["P"] == (u, a[0], a[0]) if _is_read(site) else site.settings["place"] is not None
    return not more and len(others) == 1 and known and is_turned(site, b[0], a[1]) is not None


RECIPE = Recipe(
    name="tinylora",
    formula="W' = W + B R A",
    method=METHOD,
    fits=fits,
    prepare=prepare,
    product=product,
    flipped=flipped,
)

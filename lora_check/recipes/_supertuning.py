"""Super-Tuning's names, and the places of its values: in the file, or the largest elements of the base."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from lora_check.recipes._numbers import real
from lora_check.recipes._sparse import places, scattered, sorted_by_place
from lora_check.types import Factors, Hand, Method, Numbers, Site

if TYPE_CHECKING:
    from torch import Tensor

    from lora_check.ball import Ball


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """The share of elements left alone, which end of the sizes is trained, whether saved places count, and Supra."""
    return {
        "sparsity": real(raw, "sparsity", 0.99),
        "largest": raw.get("select_top") is not False,
        "saved": raw.get("save_precomputed_indices") is not False,
        "supra": raw.get("r") is not None,
    }


def refuses(raw: Mapping[str, Any]) -> str:
    """A low-rank part without its scale, or a scale without the part: PEFT takes neither from a file."""
    if (raw.get("r") is None) == (raw.get("lora_alpha") is None):
        return ""
    return "the configuration of a Super-Tuning adapter says only one of r and lora_alpha"


METHOD = Method(
    name="SUPERTUNING",
    roles={
        "supertuning_values": "values",
        "supertuning_indices": "indices",
        "supertuning_lora_A": "A",
        "supertuning_lora_B": "B",
    },
    keys=frozenset({"lora_dropout", "save_precomputed_indices", "select_top", "sparsity"}),
    alpha="lora_alpha",
    patterns=False,
    settings=settings,
    refuses=refuses,
)
ELEMENTWISE = frozenset({"values", "indices"})


def saved_places(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The values in the order of the weight, each in the place that the file names."""
    index = places(factors["indices"], prod(site.shape), site)
    return _beside(factors, sorted_by_place(factors["values"], index, site, whole=True))


def recomputed_places(factors: Factors, site: Site, hand: Hand) -> Factors:
    """The same with the places that PEFT finds when it loads the adapter: the largest, or smallest, |W| by rank."""
    from lora_check.ball import Ball

    w, values, largest = factors["W"], factors["values"], bool(site.settings["largest"])
    if isinstance(w, Ball):
        values, index = _by_uncertain_size(w, values, largest)
    else:
        index = w.abs().reshape(-1).topk(len(values), largest=largest).indices
    return _beside(factors, sorted_by_place(values, index, site, whole=True))


def _beside(factors: Factors, placed: Factors) -> Factors:
    """The placed values, and the low-rank factors if there are any."""
    return {**{role: factors[role] for role in "AB" if role in factors}, **placed}


def _by_uncertain_size(w: Ball, values: Ball, largest: bool) -> tuple[Ball, Tensor]:
    """Values and places where |W| may tie: elements that the radii, or equality, leave in either order.

    Each of a chain of ties may have the value of any; where some of them are not trained, none of these values either.
    """
    import torch

    from lora_check.ball import Ball

    size, blur = w.mid.abs().reshape(-1), w.rad.reshape(-1)
    index = size.topk(int(values.shape[0]), largest=largest).indices
    ranked, reach = size[index], blur[index]
    tied = ranked.diff().abs() <= reach[1:] + reach[:-1]
    group = torch.cat([tied.new_zeros(1), ~tied]).cumsum(0)
    rivals = size + blur >= (ranked - reach).amin() if largest else size - blur <= (ranked + reach).amax()
    rivals[index] = False
    others = rivals.nonzero().flatten()
    low, high = _ends(values, group)
    if len(others):
        low[-1], high[-1] = low[-1].clamp_max(0), high[-1].clamp_min(0)
    group = torch.cat([group, group[-1:].expand(len(others))])
    spread = Ball((low + high) / 2, (high - low) / 2, values.u, values.rounds)
    return spread[group], torch.cat([index, others])


def _ends(values: Ball, group: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest that the values of each group can be."""
    low, high = values.mid - values.rad, values.mid + values.rad
    empty = low.new_zeros(int(group[-1]) + 1)
    least = empty.scatter_reduce(0, group, low, "amin", include_self=False)
    return least, empty.scatter_reduce(0, group, high, "amax", include_self=False)


def added(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """Supra's two additions: the trained elements first, stored, then the low-rank delta."""
    return hand.settle(w + hand.settle(scattered(factors, rows))) + delta


def low_rank(factors: Factors, rows: slice) -> Numbers:
    """(B A)[rows]."""
    return factors["B"][rows] @ factors["A"]


def values_fit(site: Site, *, saved: bool) -> bool:
    """Values for places that the file names, or as many as the configuration trains, over a matrix."""
    values, shape = site.roles.get("values", ()), site.shape
    if len(values) != 1 or site.leaf != "weight" or len(shape) != 2 or site.settings["supra"] != ("A" in site.roles):
        return False
    if "indices" in site.roles and site.settings["saved"]:
        return saved and site.roles["indices"] == values
    return not saved and values == (int(prod(shape) * (1 - site.settings["sparsity"])),)


def factors_fit(site: Site) -> bool:
    """Two factors of one rank, over a matrix."""
    a, b = site.roles.get("A", ()), site.roles.get("B", ())
    return len(a) == len(b) == 2 and a[0] == b[1] and site.shape == (b[0], a[1])

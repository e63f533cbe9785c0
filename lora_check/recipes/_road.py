"""RoAd's names, and the pairs of outputs that a weight and its bias turn alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_check.types import Factors, Hand, Method, Numbers, Site

SIZES = {"road_1": (1, 2), "road_2": (1, 1), "road_4": (2, 1)}
"""How long theta and alpha are, in multiples of the outputs, by variant."""


def settings(raw: Mapping[str, Any], module: str, targets: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """The variant and the size of a group.

    raises   ValueError: a variant or a size that no release has
    """
    variant, group = str(raw.get("variant") or "road_1"), raw.get("group_size") or 64
    if variant not in SIZES:
        raise ValueError(f"variant={variant!r} is not known to this version")
    if not isinstance(group, int) or group < 2 or group % 2:
        raise ValueError(f"group_size={group!r} does not cut the outputs into pairs")
    return {"variant": variant, "group": group}


METHOD = Method(
    name="ROAD",
    roles={"road_theta": "theta", "road_alpha": "alpha"},
    keys=frozenset({"group_size", "variant"}),
    settings=settings,
)


def are_angles(site: Site) -> bool:
    """theta and alpha as long as the variant has them, over outputs that make whole groups."""
    many, of = SIZES[site.settings["variant"]]
    size = (site.shape[0] * many // of,)
    return dict(site.roles) == {"theta": size, "alpha": size} and site.shape[0] % site.settings["group"] == 0


def columns(factors: Factors, site: Site, hand: Hand) -> tuple[Numbers, Numbers]:
    """What multiplies x1 and x2, in the model's dtype: (f1, s2) and (-s1, f2), each (groups, 2, g / 2, 1)."""
    import torch

    from lora_check.functions import joined, mapped

    theta, alpha = (_halves(factors[role], site) for role in ("theta", "alpha"))
    f = hand.settle(alpha[0] * hand.keep(mapped(theta[0], torch.cos, torch.ones_like)))
    s = hand.settle(alpha[1] * hand.keep(mapped(theta[1], torch.sin, torch.ones_like)))

    def column(first: Numbers, second: Numbers) -> Numbers:
        return joined([first[:, 0], second[:, 1]], lambda pair: torch.stack(list(pair), 1).unsqueeze(-1))

    return column(f, s), column(-s, f)


def _halves(x: Numbers, site: Site) -> Numbers:
    """What f is made of and what s is made of: (2, groups, 2, g / 2), the halves of each group side by side."""
    from lora_check.functions import moved

    half = site.settings["group"] // 2
    if site.settings["variant"] == "road_1":
        return moved(x, lambda one: one.reshape(-1, 1, half).expand(2, -1, 2, -1))
    if site.settings["variant"] == "road_2":
        return moved(x, lambda one: one.reshape(-1, 2, half).expand(2, -1, -1, -1))
    return moved(x, lambda one: one.reshape(-1, 2, 2, half).transpose(0, 1))


def halves_of(w: Numbers, site: Site) -> tuple[Numbers, Numbers]:
    """x1 and x2: the rows of the first and of the second half of each group, (groups, 1, g / 2, columns)."""
    pairs = w.reshape(-1, 2, site.settings["group"] // 2, int(w.shape[1]))
    return pairs[:, :1], pairs[:, 1:]

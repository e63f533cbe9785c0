"""The factors of several adapters -> those of the adapter that add_weighted_adapter makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import copysign, prod, sqrt
from typing import Any

from lora_check.types import Factors, Hand, LoadedStep, Numbers, Site

Pair = tuple[Numbers, Numbers]


def combined(factors: Factors, site: Site, hand: Hand) -> dict[str, Numbers]:
    """A (r, in...) and B (out, r) of the new adapter, kernels flattened; a module may lack some of the adapters.

    Factors that are laid side by side are copied into fresh ones of the model's dtype; others are kept as they come.
    """
    found = [index for index in range(len(site.settings["weights"])) if _role("A", site) + str(index) in factors]
    pairs = [_pair(factors, site, index) for index in found]
    weights = [site.settings["weights"][index] for index in found]
    scales = [site.settings["scales"][index] for index in found]
    kind, options = site.settings["combination"], site.settings["options"]
    if kind.of == "ranks":
        return {role: hand.settle(made) for role, made in _side_by_side(pairs, weights, scales).items()}
    if kind.of == "factors":
        left, right = site.settings.get("shares", _roots)(weights, scales)
        a = kind.mix([pair[0] for pair in pairs], left, options)
        return {"A": a, "B": kind.mix([pair[1] for pair in pairs], right, options)}
    again = site.settings.get("scaled twice", False)
    deltas = [(b @ a) * scale for (a, b), scale in zip(pairs, scales, strict=True)]
    shared = [weight * scale if again else weight for weight, scale in zip(weights, scales, strict=True)]
    from lora_check.decompositions import leading

    return {"whole": leading(kind.mix(deltas, shared, options), options.svd_rank, lambda u, s, vt: (u * s) @ vt)}


def _pair(factors: Factors, site: Site, index: int) -> Pair:
    a, b = factors[f"{_role('A', site)}{index}"], factors[f"{_role('B', site)}{index}"]
    return a.reshape(int(a.shape[0]), -1), b.reshape(int(b.shape[0]), -1)


def _role(factor: str, site: Site) -> str:
    return f"embedding_{factor}" if any(role.startswith("embedding_") for role in site.roles) else factor


def _side_by_side(pairs: Sequence[Pair], weights: Sequence[float], scales: Sequence[float]) -> dict[str, Numbers]:
    import torch

    from lora_check.functions import joined

    scaled = [a * weight * scale for (a, _), weight, scale in zip(pairs, weights, scales, strict=True)]
    a = joined(scaled, lambda parts: torch.cat(list(parts), 0))
    return {"A": a, "B": joined([b for _, b in pairs], lambda parts: torch.cat(list(parts), 1))}


def _roots(weights: Sequence[float], scales: Sequence[float]) -> tuple[list[float], list[float]]:
    """Of A: sign(w s) sqrt(|w s|); of B: sqrt(|w s|). PEFT 0.9 on; negative weights since 0.19."""
    products = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    sizes = [sqrt(abs(one)) for one in products]
    return [copysign(size, one) for size, one in zip(sizes, products, strict=True)], sizes


def _signed_twice(weights: Sequence[float], scales: Sequence[float]) -> tuple[list[float], list[float]]:
    """PEFT 0.18: the sign stands on both sides, where it cancels but for the cross terms."""
    signed, _ = _roots(weights, scales)
    return signed, signed


def _rooted_weights(weights: Sequence[float], scales: Sequence[float]) -> tuple[list[float], list[float]]:
    """PEFT 0.7 and 0.8: of A sqrt(w) s, of B sqrt(w)."""
    roots = [sqrt(abs(weight)) for weight in weights]
    return [root * scale for root, scale in zip(roots, scales, strict=True)], roots


def _one_sided(weights: Sequence[float], scales: Sequence[float]) -> tuple[list[float], list[float]]:
    """PEFT 0.4 to 0.6: of A w s, of B 1."""
    return [weight * scale for weight, scale in zip(weights, scales, strict=True)], [1.0] * len(weights)


def _with(**settings: Any) -> Callable[[LoadedStep], LoadedStep]:
    def changed(step: LoadedStep) -> LoadedStep:
        assert step.site is not None
        return replace(step, site=replace(step.site, settings={**step.site.settings, **settings}))

    return changed


RELEASES: Mapping[str, Callable[[LoadedStep], LoadedStep]] = {
    "PEFT 0.18": _with(shares=_signed_twice),
    "PEFT 0.7 and 0.8": _with(shares=_rooted_weights),
    "PEFT 0.4 to 0.6": _with(shares=_one_sided),
    "PEFT 0.9 to 0.20": _with(**{"scaled twice": True}),
}


def widths(site: Site) -> tuple[int, int] | None:
    """(in, out) that all factors of a combination agree on; None, if this is none or they do not."""
    if "combination" not in site.settings or not site.roles:
        return None
    a, b = _role("A", site), _role("B", site)
    numbers = {role.removeprefix(factor) for role in site.roles for factor in (a, b) if role.startswith(factor)}
    if set(site.roles) != {f"{factor}{number}" for factor in (a, b) for number in numbers}:
        return None
    inputs = {prod(site.roles[f"{a}{number}"][1:]) for number in numbers}
    outputs = {site.roles[f"{b}{number}"][0] for number in numbers}
    return (inputs.pop(), outputs.pop()) if len(inputs) == len(outputs) == 1 else None

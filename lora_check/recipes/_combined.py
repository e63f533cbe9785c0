"""The factors of several adapters -> those of the adapter that add_weighted_adapter makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from math import copysign, prod, sqrt
from typing import Any

from lora_check.types import Factors, Hand, LoadedStep, Numbers, Site

Pair = tuple[Numbers, Numbers]
Shares = Sequence[Sequence[float]]


def combined(factors: Factors, site: Site, hand: Hand, turned: bool) -> dict[str, Numbers]:
    """A (r, in...) and B (out, r) of the new adapter, kernels flattened; a module may lack some of the adapters.

    Of deltas that are cut to a rank the whole one, and what it was cut from, both (out, in).

    turned   the weight is (in, out): so whole deltas lie while they are pruned, and which of equal numbers stay depends
             on their places

    Factors that are laid side by side are copied into fresh ones of the model's dtype; others are kept as they come.
    Adapters that are held in 16 bits: weights are float32 tensors, so what they multiply is summed up in float32. The
    sum of factors is stored as these are, that of deltas is not. Where a weight is a Python number each product is
    stored: of factors laid side by side, and of those that releases before 0.9 added in place.
    """
    found = [index for index in range(len(site.settings["weights"])) if _role("A", site) + str(index) in factors]
    pairs = [_pair(factors, site, index) for index in found]
    weights = [site.settings["weights"][index] for index in found]
    scales = [site.settings["scales"][index] for index in found]
    kind, options = site.settings["combination"], site.settings["options"]
    if kind.of == "ranks":
        return {role: hand.settle(made) for role, made in _side_by_side(pairs, weights, scales, hand).items()}
    if kind.of == "factors":
        return _mixed(pairs, weights, scales, site, hand)
    again = site.settings.get("scaled twice", False)
    deltas = [hand.combined(hand.member(b @ a) * scale) for (a, b), scale in zip(pairs, scales, strict=True)]
    shared = [weight * scale if again else weight for weight, scale in zip(weights, scales, strict=True)]
    mixed = kind.mix([one.T if turned else one for one in deltas], shared, options)
    from lora_check.decompositions import leading

    mixed = mixed.T if turned else mixed
    return {"mixed": mixed, "whole": leading(mixed, options.svd_rank, lambda u, s, vt: (u * s) @ vt)}


def turned_over(made: Factors) -> dict[str, Numbers]:
    """The same of a weight that is (in, out)."""
    other = {"A": "B", "B": "A"}
    return {other.get(role, role): x.T for role, x in made.items()}


def _pair(factors: Factors, site: Site, index: int) -> Pair:
    a, b = factors[f"{_role('A', site)}{index}"], factors[f"{_role('B', site)}{index}"]
    return a.reshape(int(a.shape[0]), -1), b.reshape(int(b.shape[0]), -1)


def _role(factor: str, site: Site) -> str:
    return f"embedding_{factor}" if any(role.startswith("embedding_") for role in site.roles) else factor


def _mixed(
    pairs: Sequence[Pair], weights: Sequence[float], scales: Sequence[float], site: Site, hand: Hand
) -> dict[str, Numbers]:
    """A and B as the weighted sums of theirs, each side with its own weights."""
    settings, kind = site.settings, site.settings["combination"]
    sides = zip(*pairs, strict=True)
    if kind.name == "linear" and "in place" in settings:
        shares = settings["in place"](weights, scales)
        made = (_added(side, share, hand) for side, share in zip(sides, shares, strict=True))
    else:
        shares = settings.get("shares", _roots)(weights, scales)
        made = (hand.combined(kind.mix(*one, settings["options"])) for one in zip(sides, shares, strict=True))
    return dict(zip("AB", made, strict=True))


def _added(tensors: Sequence[Numbers], shares: Sequence[Sequence[float]], hand: Hand) -> Numbers:
    """sum_i T_i f_i1 f_i2 ..., every product and sum stored as the tensors are."""
    made = [
        reduce(lambda x, factor: hand.combined(x * factor), share, tensor)
        for tensor, share in zip(tensors, shares, strict=True)
    ]
    return reduce(lambda total, one: hand.combined(total + one), made)


def _side_by_side(
    pairs: Sequence[Pair], weights: Sequence[float], scales: Sequence[float], hand: Hand
) -> dict[str, Numbers]:
    import torch

    from lora_check.functions import joined

    weighted = [hand.combined(a * weight) for (a, _), weight in zip(pairs, weights, strict=True)]
    scaled = [hand.combined(one * scale) for one, scale in zip(weighted, scales, strict=True)]
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


def _rooted_weights(weights: Sequence[float], scales: Sequence[float]) -> tuple[Shares, Shares]:
    """PEFT 0.7 and 0.8: of A sqrt(w) s, of B sqrt(w)."""
    roots = [sqrt(abs(weight)) for weight in weights]
    return list(zip(roots, scales, strict=True)), [(root,) for root in roots]


def _one_sided(weights: Sequence[float], scales: Sequence[float]) -> tuple[Shares, Shares]:
    """PEFT 0.4 to 0.6: of A w s, of B 1."""
    return list(zip(weights, scales, strict=True)), [()] * len(weights)


def _with(of: str, **settings: Any) -> Callable[[LoadedStep], LoadedStep]:
    """Other settings for kinds that mix `of`; the very step for others, whose formula was the same."""

    def changed(step: LoadedStep) -> LoadedStep:
        assert step.site is not None
        if step.site.settings["combination"].of != of:
            return step
        return replace(step, site=replace(step.site, settings={**step.site.settings, **settings}))

    return changed


RELEASES: Mapping[str, Callable[[LoadedStep], LoadedStep]] = {
    "PEFT 0.18": _with("factors", shares=_signed_twice),
    "PEFT 0.7 and 0.8": _with("factors", **{"in place": _rooted_weights}),
    "PEFT 0.4 to 0.6": _with("factors", **{"in place": _one_sided}),
    "PEFT 0.9 to 0.20": _with("deltas", **{"scaled twice": True}),
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

"""What a forward says, in words that the text, the markdown and the JSON share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lora_check.forwarding.nouns import Departure, Forward, Parting
from lora_check.renderers import _words as words
from lora_check.report import Report

MODULES_SHOWN = 4
KEYS_SHOWN = 6


def sentence(found: Forward) -> str:
    """The verdict and what it rests on."""
    return f"{found.verdict.value}: {_computed(found)}; {_weights(found.report)}"


def _computed(found: Forward) -> str:
    first, invented = found.first, found.invented("base", "unmerged") or found.invented("merged")
    if found.answer == "agrees":
        return f"the merged model computes what base and adapters compute, in all {found.lockstep.modules} modules"
    if found.answer == "departs" and first is not None:
        told = f"{how(first)}; {weight_of(found, first)}"
        return f"{words.plain(first.place)} is the first module whose output departs: {told}"
    if invented:
        return words.plain(invented[0])
    if first is not None:
        return f"{departure(first)}, and how much a module of its kind may round is not derived"
    return found.lockstep.unjudged or "no module was compared"


def _weights(report: Report) -> str:
    return f"the weights are {report.verdict.value}"


def departure(one: Departure) -> str:
    """`model.layers.3.self_attn.q_proj: 0.0000 of the adapter's effect arrives, 1 within 0.021 is rounding`."""
    return f"{words.plain(one.place)}: {how(one)}"


def how(one: Departure) -> str:
    """In what it departs, and what rounding explains of that."""
    if one.how == "arrival":
        return f"{one.share:.4f} of the adapter's effect arrives, 1 within {one.budget:.2g} is rounding"
    if one.how == "calls":
        return f"it {words.plain(one.says)}"
    if one.how == "input":
        return f"{words.plain(one.says)} is something else, made of the same numbers"
    if math.isinf(one.size):
        return f"its output is {words.plain(one.says) or 'not finite'}"
    allowed = f"and rounding explains {one.budget:.2g}" if one.budget else "and nothing there rounds"
    return f"its output is off by {one.size:.3g}, {allowed}"


def departures(found: Forward) -> list[Departure]:
    """In the order of execution, each module once."""
    once: dict[str, Departure] = {}
    for one in found.lockstep.departures:
        if one.place not in once or one.how == "arrival":  # which tells more than the size
            once[one.place] = one
    return list(once.values())


def weight_of(found: Forward, one: Departure) -> str:
    """`its weight is refuted: LC101`."""
    told = found.weights.get(one.place, ())
    if not told:
        own = f"it {one.says}" if one.says.startswith("shares") else "it has no tensor of its own"
        return words.plain(own)
    codes = ", ".join(told[1:])
    return f"its weight is {told[0]}{f': {codes}' if codes else ''}"


def reasons(found: Forward) -> list[str]:
    """Why a model of right weights computes something else, as far as the files say."""
    lines = [f"{name} differs: {_few(keys.items())}" for name, keys in found.differences.items()]
    return [*lines, *found.remarks]


def _few(items: Iterable[tuple[str, tuple[Any, Any]]]) -> str:
    told = [f"{words.plain(key)} {words.plain(new)}, {words.plain(old)} in BASE" for key, (old, new) in items]
    rest = [f"and {len(told) - KEYS_SHOWN} more"] if len(told) > KEYS_SHOWN else []
    return "; ".join([*told[:KEYS_SHOWN], *rest])


def scale(found: Forward) -> str:
    """How large the difference is beside what the adapter does, and beside what an honest merge leaves."""
    by = {(one.one, one.other): one for one in found.pairs}
    ours, honest, effect = by["merged", "unmerged"], by["live", "unmerged"], by["unmerged", "base"]
    share = f", {ours.kl_mean / effect.kl_mean:.2g} of" if effect.kl_mean > 0 else ";"
    beside = f"{share} the adapter's effect, {effect.kl_mean:.2g}"
    exact = "; its logits are those of PEFT's own merge, bit for bit" if by["merged", "live"].exact else ""
    return (
        f"KL to the unmerged model {ours.kl_mean:.2g} nats a token{beside}; "
        f"PEFT's own merge of these files leaves {honest.kl_mean:.2g}{exact}"
    )


def parting(found: Forward, one: Parting) -> str:
    """Where two continuations part, with what, and whether that says anything."""
    mine, theirs = (_token(token) for token in one.tokens)
    told = f"prompt {one.sequence + 1} parts at new token {one.position + 1}: merged {mine}, unmerged {theirs}"
    if one.margins is None:
        return told
    margins = f", preferred by {one.margins[0]:.3g} and {one.margins[1]:.3g}"
    return f"{told}{margins}{': a near tie that rounding decides' if one.by_rounding else ''}"


def _token(token: int | None) -> str:
    return "the end" if token is None else str(token)


def same(found: Forward) -> str:
    """How many continuations of merged and unmerged are the same, token for token."""
    whole = sum(bool(new) for new in found.said["unmerged"].new)
    return f"{whole - len(found.partings)} of {words.many(whole, 'continuation')} the same" if whole else ""

"""What a forward says, in words that the text, the markdown and the JSON share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lora_check.forwarding.kinds import Kind
from lora_check.forwarding.nouns import Departure, Forward, Lockstep, Pair, Parting
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
        return f"the merged model computes what base and adapters compute, in all {_modules(found.lockstep)}"
    if found.answer == "departs" and first is not None:
        told = f"{how(first)}; {weight_of(found, first)}"
        return f"{words.plain(first.place)} is the first module whose output departs: {told}"
    if invented:
        return words.plain(invented[0])
    if first is not None:
        return f"{departure(first)}, and how much a module of its kind may round is not derived"
    return found.lockstep.unjudged or "no module was compared"


def _modules(lockstep: Lockstep) -> str:
    """`44 modules`, or `44 modules that ran (4 never did)`: experts that no token is sent to, unused poolers."""
    told = words.many(lockstep.modules, "module")
    return f"{told} that ran ({len(lockstep.idle)} never did)" if lockstep.idle else told


def _weights(report: Report) -> str:
    return f"the weights are {report.verdict.value}"


def departure(one: Departure) -> str:
    """`model.layers.3.self_attn.q_proj: 0.0000 of the adapter's effect arrives, 1 within 0.021 is rounding`."""
    return f"{words.plain(one.place)}: {how(one)}"


def how(one: Departure) -> str:
    """In what it departs, and what rounding explains of that."""
    if one.how == "arrival" and one.share is not None and not math.isfinite(one.share):
        return "its output is not finite"
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
    ours, honest, effect = (
        None if one not in by else _distance(by[one], found.kind)
        for one in (("merged", "unmerged"), ("live", "unmerged"), ("unmerged", "base"))
    )
    assert ours is not None
    assert honest is not None
    if not math.isfinite(ours):
        return "how far the merged model lies from the unmerged one cannot be told: not every answer is finite"
    share = f", {ours / effect:.2g} of" if effect else ";"
    beside = "" if effect is None else f"{share} the adapter's effect, {effect:.2g}"
    exact = f"; its {found.kind.of}s are those of PEFT's own merge, bit for bit" if by["merged", "live"].exact else ""
    unit = f" nats a {found.kind.each}" if found.kind.chances else ""
    size = "KL" if found.kind.chances else "largest difference"
    return (
        f"{size} to the unmerged model {ours:.2g}{unit}{beside}; "
        f"PEFT's own merge of these files leaves {honest:.2g}{exact}"
    )


def _distance(one: Pair, kind: Kind) -> float:
    """The KL divergence, or the largest difference of answers that are no distribution."""
    return one.logit_max if one.kl_mean is None or not kind.chances else one.kl_mean


def parting(found: Forward, one: Parting) -> str:
    """Where two continuations part, with what, and whether that says anything."""
    mine, theirs = (_token(found, token) for token in one.tokens)
    told = f"prompt {one.sequence + 1} parts at new token {one.position + 1}: merged {mine}, unmerged {theirs}"
    if one.margins is None:
        return told
    margins = f", preferred by {one.margins[0]:.3g} and {one.margins[1]:.3g}"
    return f"{told}{margins}{': a near tie that rounding decides' if one.by_rounding else ''}"


def _token(found: Forward, token: int | None) -> str:
    """`1217 " called"`."""
    if token is None:
        return "the end"
    text = found.tokens.get(token, "")
    return str(token) if text in ("", str(token)) else f'{token} "{words.plain(text)}"'


def same(found: Forward) -> str:
    """How many continuations of merged and unmerged are the same, token for token."""
    whole = sum(one.goes_on for one in found.asked) if found.said["unmerged"].new else 0
    return f"{whole - len(found.partings)} of {words.many(whole, 'continuation')} the same" if whole else ""

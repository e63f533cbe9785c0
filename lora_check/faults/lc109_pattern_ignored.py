"""LC109 pattern-ignored

What it is
The adapter gives some modules their own alpha or rank, and the merge used the general ones, or another module's.

How it happens
The merge reads r and lora_alpha only, and neither rank_pattern nor alpha_pattern (diffusers, axolotl).
The patterns are matched by another rule than PEFT's, so that they miss, or the first one is taken for all.

How it is told
W' = W + s B A reproduces every element with s made of the general alpha and r, of the general alpha alone,
of the general r alone, or of the alpha or rank that a pattern gives to other modules. What the configuration
gives no number of its own is right, unless another's was taken for it.

Evidence
alpha, rank: what was used in place of the module's own. scale, right: the scales that they make.

What to do
Merge with a tool that reads rank_pattern and alpha_pattern, or take r from the shape of each lora_A.

Seen in
huggingface/peft#2194, huggingface/diffusers#14409, axolotl-ai-cloud/axolotl#3673, huggingface/peft#1746,
WalkingMeatAxolotl/AnimaLoraStudio#350
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lora_check.faults._cases import deltas, rescaled
from lora_check.faults._said import ways
from lora_check.types import Case, Scale, ValueFault

MOST = 4
"""So many numbers of other modules' patterns are tried: each costs a look at the tensor."""


def inject(case: Case) -> tuple[Case, ...]:
    """s made of the general alpha and rank, of either, or of another module's: each that is another number."""
    distinct: dict[tuple[float, ...], Case] = {}
    for change, told in _changes(case):
        for other in rescaled(case, change, **told):
            distinct.setdefault(tuple(step.s for step in other.steps), other)
    return tuple(distinct.values())


def _changes(case: Case) -> Iterator[tuple[Callable[[Scale], Scale], dict[str, Any]]]:
    scales = [step.scale for step in deltas(case) if step.scale]
    ranks = ["rank_pattern"] if any(one.rank != one.default_rank for one in scales) else []
    alphas = ["alpha_pattern"] if any(one.alpha != one.default_alpha for one in scales) else []
    yield _both, {"ignored": " and ".join(ranks + alphas)}
    yield _alpha, {"ignored": "alpha_pattern"}
    yield _rank, {"ignored": "rank_pattern"}
    for alpha in _others(case, "alpha_pattern"):
        yield partial(_with, alpha=alpha), {"ignored": "alpha_pattern", "alpha": alpha}
    for rank in _others(case, "rank_pattern"):
        yield partial(_with, rank=int(rank)), {"ignored": "rank_pattern", "rank": int(rank)}


def _both(scale: Scale) -> Scale:
    return replace(scale, alpha=scale.default_alpha, rank=scale.default_rank)


def _alpha(scale: Scale) -> Scale:
    return replace(scale, alpha=scale.default_alpha)


def _rank(scale: Scale) -> Scale:
    return replace(scale, rank=scale.default_rank)


def _with(scale: Scale, **changes: Any) -> Scale:
    return replace(scale, **changes)


def _others(case: Case, key: str) -> list[float]:
    """The numbers that the patterns of one adapter give to any module."""
    patterns = [step.site.settings.get(key) for step in deltas(case) if step.site]
    if len(patterns) != 1 or not isinstance(patterns[0], Mapping):
        return []
    return [float(one) for one in dict.fromkeys(patterns[0].values()) if isinstance(one, int | float) and one > 0][
        :MOST
    ]


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """'rank_pattern ignored'; of numbers that another module's pattern gives, 'mistaken'."""
    patterns = ways(told, "ignored") or "rank_pattern or alpha_pattern"
    return f"{patterns} {'mistaken' if any({'alpha', 'rank'} & one.keys() for one in told) else 'ignored'}"


FAULT = ValueFault(
    code="LC109",
    name="pattern-ignored",
    severity="error",
    summary="rank_pattern or alpha_pattern ignored",
    help="merge with a tool that reads rank_pattern and alpha_pattern",
    inject=inject,
    tell=tell,
    causes=("M24",),
)

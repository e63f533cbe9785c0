"""Which refuted tensor is asked about which mistakes.

Asking about every mistake costs far more than comparing, and most often all tensors of a model went wrong in one way.
So a few are asked about all mistakes, and every other one about those that were found in them, round by round until
nothing is left unexplained. Pooling names the same mistake as if all had been asked in full, but for one that would
have to explain none of the tensors that were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_check.diagnose import UNEXPLAINED, Known, unexplained
from lora_check.findings import Diagnosis
from lora_check.work import Refuted

IN_VAIN, SHARE = 8, 32
"""At least so many tensors, and one in so many, may be asked about every mistake in vain. It decides no verdict, and a
tensor that stays unexplained without having been asked in full says so."""

FACTORS = 16
"""So many fitted factors are tried on other tensors; where there are more, each tensor has its own."""

GOLDEN = (5**0.5 - 1) / 2

Ask = Callable[[Sequence[Refuted], Known | None], Sequence[Diagnosis | None]]


def name_all(refuted: Sequence[Refuted], ask: Ask) -> list[Diagnosis]:
    """One diagnosis for each refuted tensor, but none for a bystander that nothing explains.

    ask   (tensors, known mistakes, or None for all) -> the diagnosis of each, or None
    """
    asked = [_Asked(one) for one in refuted]
    state = _State(asked, [asked[place] for place in sorted(range(len(asked)), key=lambda place: place * GOLDEN % 1)])
    allowed = max(IN_VAIN, len(refuted) // SHARE)
    while allowed > 0 and (chosen := state.next(allowed)):
        for one, answer in zip(chosen, ask([one.refuted for one in chosen], None), strict=True):
            one.in_full, one.diagnosis = True, answer
            allowed -= answer is None or answer.codes == (UNEXPLAINED,)
        fresh = state.learn(chosen)
        others = [one for one in state.asked if not one.in_full] if fresh else []
        for one, answer in zip(others, ask([one.refuted for one in others], fresh) if others else (), strict=True):
            one.diagnosis = _merged(one.diagnosis, answer)
    return [answer for one in state.asked if (answer := one.answer())]


@dataclass(slots=True)
class _Asked:
    """A refuted tensor, what is known of it so far, and whether it was asked about everything."""

    refuted: Refuted
    diagnosis: Diagnosis | None = None
    in_full: bool = False

    @property
    def group(self) -> tuple[Any, ...]:
        """What tensors share that a mistake can be expected to have changed alike."""
        pairing = self.refuted.pairing
        scales = tuple(step.scale for step in pairing.steps)
        return pairing.kind, pairing.recipe, pairing.merged.dtype, scales

    def answer(self) -> Diagnosis | None:
        """The diagnosis; where the tensor was asked about some mistakes only and none fits, that says so."""
        if self.diagnosis or self.in_full or self.refuted.pairing.kind == "bystander":
            return self.diagnosis
        return unexplained(self.refuted.pairing.merged.name, in_full=False)


@dataclass(slots=True)
class _State:
    """All refuted tensors, the order in which they are chosen, and the mistakes found so far."""

    asked: list[_Asked]
    order: list[_Asked]
    known: dict[str, list[Any]] = field(default_factory=dict)

    def next(self, allowed: int) -> list[_Asked]:
        """Of each group one tensor that nothing explains yet, spread over the model; `allowed` of them at most."""
        self.order = [one for one in self.order if not one.in_full and one.diagnosis is None]
        first: dict[tuple[Any, ...], _Asked] = {}
        for one in self.order:
            first.setdefault(one.group, one)
        return list(first.values())[:allowed]

    def learn(self, chosen: Sequence[_Asked]) -> Known:
        """The mistakes that were not known before these tensors told them, or not with that factor."""
        fresh: dict[str, list[Any]] = {}
        for answer in (one.diagnosis for one in chosen if one.diagnosis):
            for code, evidence in answer.evidence.items():
                told = self.known.setdefault(code, [])
                if len(told) < FACTORS and all(evidence.get("factor") != one.get("factor") for one in told):
                    fresh.setdefault(code, []).append(evidence)
                    told.append(evidence)
        return fresh


def _merged(one: Diagnosis | None, other: Diagnosis | None) -> Diagnosis | None:
    """What both tell of one tensor."""
    if one is None or other is None:
        return one or other
    return replace(
        one,
        codes=(*one.codes, *other.codes),
        evidence={**one.evidence, **other.evidence},
        rarity={**one.rarity, **other.rarity},
    )

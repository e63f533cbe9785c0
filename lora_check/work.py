"""One work item: load a pairing, compare it, name the mistake if it is refuted. Pure but for reading its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_check.compare import Measure, compare, compare_copy, likely
from lora_check.diagnose import name_tensor, not_finite
from lora_check.findings import Diagnosis
from lora_check.quantised import Stored, grid_of, stored_as
from lora_check.requantised import measure_again, measure_codes, measure_stored
from lora_check.rounding import ADD, FORMATS, arithmetics, conversions
from lora_check.types import (
    Adapter,
    Arithmetic,
    Case,
    Checkpoint,
    Comparison,
    LoadedStep,
    Pairing,
    Peer,
    Plan,
    Step,
    Verdict,
)

SAMPLES = 3
"""Targets whose first rows are asked which arithmetic made the model, before the pass begins."""


SESSION = "the session that trained the adapter, before its patterns were sorted"
"""Who may have taken another of several patterns that match one module."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One tensor, compared and, if refuted, diagnosed."""

    comparison: Comparison
    diagnosis: Diagnosis | None


@dataclass(frozen=True, slots=True)
class Job:
    """The opened inputs, and for each pair of dtypes the arithmetic to try first."""

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    merged: Checkpoint
    hints: Mapping[tuple[str, str], Arithmetic]
    alike: Mapping[tuple[Any, ...], Sequence[Pairing]] = field(default_factory=dict)

    def outcome(self, pairing: Pairing) -> Outcome:
        """Compare one tensor; diagnose it if it is refuted."""
        if pairing.undecidable:
            return Outcome(_undecided(pairing), None)
        if (copied := self.copied(pairing)) is not None:
            return Outcome(_comparison(pairing, copied), None)
        case, actual = self.load(pairing)
        orders = orders_for(pairing)
        measure = self.measure(pairing, case, actual, orders)
        if measure.fits:
            return Outcome(_comparison(pairing, measure), None)
        for release, changed in self.older(pairing, case):
            other = self.measure(pairing, changed, actual, orders)
            if other.fits:
                return Outcome(replace(_comparison(pairing, other), release=release), None)
        if (again := self.quantised_again(pairing, case, actual, orders)) is not None:
            return Outcome(_comparison(pairing, again), None)
        asked = self.with_circumstances(pairing, case)
        return Outcome(_comparison(pairing, measure), _diagnosis(pairing, measure, asked, actual, orders))

    def with_circumstances(self, pairing: Pairing, case: Case) -> Case:
        """The case with all that a mistake may have to know of it: its names, its model, and the targets like it."""
        ours, _ = self.in_codes(pairing)
        others = [one for one in self.alike.get(kin(pairing), ()) if one is not pairing]
        return replace(
            case,
            name=pairing.merged.name,
            module=pairing.module,
            config=self.base.config,
            codes=partial(ours.file.read, ours.codes) if ours else None,
            peers=tuple(
                Peer(tensor=one.merged.name, module=one.module, steps=partial(self._steps, one)) for one in others
            ),
        )

    def _steps(self, pairing: Pairing) -> tuple[LoadedStep, ...]:
        return tuple(self._step(step) for step in pairing.steps)

    def older(self, pairing: Pairing, case: Case) -> Iterator[tuple[str, Case]]:
        """The case as other releases take the same adapter, unless it names its own, and as other machines do."""
        told = [bool(self.adapters[step.adapter].config.producer) for step in pairing.steps]
        known = [
            {**step.recipe.anywhere, **({} if recorded else step.recipe.releases)}
            for step, recorded in zip(case.steps, told, strict=True)
        ]
        for name in dict.fromkeys(name for one in known for name in one):
            steps = (one[name](step) if name in one else step for step, one in zip(case.steps, known, strict=True))
            yield name, replace(case, steps=tuple(steps))
        for alpha in dict.fromkeys(one for step in case.steps if step.scale for one in step.scale.other_alphas):
            yield SESSION, replace(case, steps=tuple(_with_alpha(step, alpha) for step in case.steps))

    def copied(self, pairing: Pairing) -> Measure | None:
        """Numbers for a tensor that no adapter touches and that both files keep in the same kind of codes.

        None where it may be no copy, but decoded and quantised once more.
        """
        ours, theirs = self.in_codes(pairing)
        if pairing.steps or ours is None or theirs is None or ours.coded.meta.codes != theirs.coded.meta.codes:
            return None
        seen = measure_stored(ours, theirs)
        return seen if seen.fits or not theirs.grid_is_known else None

    def in_codes(self, pairing: Pairing) -> tuple[Stored | None, Stored | None]:
        """How the base tensor and the merged one are quantised, if they are."""
        ours = stored_as(self.base, pairing.base.name) if pairing.base else None
        return ours, stored_as(self.merged, pairing.merged.name)

    def quantised_again(
        self, pairing: Pairing, case: Case, actual: Tensor, orders: Sequence[Arithmetic]
    ) -> Measure | None:
        """Numbers for a merge into the codes of the base that was decoded afterwards; None: it is none."""
        ours, _ = self.in_codes(pairing)
        if ours is None or not ours.grid_is_known or case.grid is not None or pairing.kind != "target":
            return None
        return measure_again(case, grid_of(ours), actual, orders)

    def measure(self, pairing: Pairing, case: Case, actual: Tensor, orders: Sequence[Arithmetic]) -> Measure:
        """Numbers for one tensor."""
        if case.grid is not None:
            return measure_codes(case, actual, orders)
        if pairing.kind != "target":
            modelled = pairing.merged.dtype in FORMATS
            return compare_copy(case, actual, conversions(*_dtypes(pairing)) if modelled else orders)
        return compare(case, actual, orders, self.hints.get(_dtypes(pairing)))

    def load(self, pairing: Pairing) -> tuple[Case, Tensor]:
        """The case of a pairing and the merged tensor, both as matrices whose rows are the first dimension."""
        steps = self._steps(pairing)
        ours, theirs = self.in_codes(pairing)
        grid = grid_of(theirs, ours) if theirs and theirs.coded.meta.codes else None
        stacked = grid is not None or any(step.recipe.stacked for step in steps)
        actual = rows_of(self.merged.read(pairing.merged.name), stacked)
        base = rows_of(self.base.read(pairing.base.name), stacked) if pairing.base else None
        if base is None or base.shape != actual.shape:
            # What an adapter brings whole, in a shape of its own, has no base: zeros that take no memory.
            base = torch.zeros((1, 1), dtype=actual.dtype if base is None else base.dtype).expand(actual.shape)
        if ours and ours.coded.meta.codes and not steps and grid is None:
            # Libraries differ in the sign of a decoded zero.
            base, actual = base + 0, actual + 0
        if len(steps) == 1 and steps[0].recipe.settled and grid is None and pairing.base:
            steps = (steps[0].recipe.settled(steps[0], base, actual),)
        return Case(base=base, steps=steps, storage=pairing.merged.dtype, grid=grid), actual

    def _step(self, step: Step) -> LoadedStep:
        checkpoint = self.adapters[step.adapter].checkpoint
        factors = {role: checkpoint.read(name) for role, name in step.factors.items()}
        return LoadedStep(
            recipe=step.recipe,
            factors=factors | {role: view.of(factors[role]) for role, view in step.views.items()},
            scale=step.scale,
            tokens=step.tokens,
            site=step.site,
            companions={role: self.base.read(name) for role, name in step.companions.items()},
            window=step.window,
            adapter=step.adapter,
        )


def kin(pairing: Pairing) -> tuple[Any, ...]:
    """What two targets share if the factors of one fit the other."""
    return pairing.merged.shape, pairing.recipe, len(pairing.steps)


def alike(plan: Plan) -> dict[tuple[Any, ...], list[Pairing]]:
    """The targets whose factors could be mistaken for one another, together."""
    groups: dict[tuple[Any, ...], list[Pairing]] = {}
    for pairing in plan.targets:
        if not pairing.undecidable:
            groups.setdefault(kin(pairing), []).append(pairing)
    return groups


def _with_alpha(step: LoadedStep, alpha: float) -> LoadedStep:
    """The step with another pattern's alpha, if it is one that matches its module."""
    if step.scale is None or alpha not in step.scale.other_alphas:
        return step
    return replace(step, scale=replace(step.scale, alpha=alpha))


def orders_for(pairing: Pairing) -> tuple[Arithmetic, ...]:
    """The arithmetics an honest producer of this tensor may have used."""
    storage, base = _dtypes(pairing)
    if storage not in FORMATS:
        return (ADD,)
    return arithmetics(storage, base, others=any(step.recipe.method for step in pairing.steps))


def rows_of(tensor: Tensor, stacked: bool = False) -> Tensor:
    """A tensor as a matrix: its first dimension, and all others in one; of a stack, the rows of all its matrices."""
    if tensor.ndim == 0:
        return tensor.reshape(1, 1)
    if stacked:
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.reshape(tensor.shape[0], -1) if tensor.numel() else tensor.reshape(0, 1)


def _dtypes(pairing: Pairing) -> tuple[str, str]:
    return pairing.merged.dtype, (pairing.base or pairing.merged).dtype


def hints(
    plan: Plan, base: Checkpoint, adapters: tuple[Adapter, ...], merged: Checkpoint
) -> dict[tuple[str, str], Arithmetic]:
    """For each pair of dtypes, the arithmetic that the first rows of its first targets were made with."""
    groups: dict[tuple[str, str], list[Pairing]] = {}
    for pairing in plan.targets:
        if not pairing.undecidable:
            groups.setdefault(_dtypes(pairing), []).append(pairing)
    job = Job(base, adapters, merged, {})
    return {
        dtypes: likely([job.load(one) for one in members[:SAMPLES]], orders_for(members[0]))
        for dtypes, members in groups.items()
    }


def _comparison(pairing: Pairing, measure: Measure) -> Comparison:
    verdict = Verdict.VERIFIED if measure.fits else Verdict.REFUTED
    # A budget that hides the delta comes from storing numbers, or from a formula that takes the base apart.
    apart = measure.blurred and any(step.recipe.reads == "whole" or step.recipe.loads for step in pairing.steps)
    vanished, blurred = measure.vanished and not apart, measure.blurred and (apart or not measure.vanished)
    return replace(
        _undecided(pairing),
        verdict=Verdict.INCONCLUSIVE if measure.fits and _doubtful(measure) else verdict,
        exact=measure.exact,
        arithmetic=measure.arithmetic if measure.fits and pairing.kind == "target" else None,
        over_budget=measure.over_budget,
        worst=measure.worst,
        signal=measure.signal,
        overlap=measure.overlap,
        noise=measure.noise,
        vanished=vanished,
        blurred=blurred,
        strange=measure.strange,
        nonfinite=measure.nonfinite,
    )


def _doubtful(measure: Measure) -> bool:
    """Whether what fits proves nothing."""
    return measure.vanished or measure.blurred or measure.strange > 0


def _undecided(pairing: Pairing) -> Comparison:
    """What is known of a tensor before a byte of it is read."""
    return Comparison(
        tensor=pairing.merged.name,
        kind=pairing.kind,
        recipe=pairing.recipe,
        module=pairing.module,
        adapters=pairing.adapters,
        shape=pairing.merged.shape,
        dtype=pairing.merged.stored_as,
        verdict=Verdict.INCONCLUSIVE,
        exact=False,
    )


def _diagnosis(
    pairing: Pairing, measure: Measure, case: Case, actual: Tensor, orders: Sequence[Arithmetic]
) -> Diagnosis | None:
    if measure.nonfinite:
        return not_finite(pairing.merged.name, measure.nonfinite)
    return name_tensor(pairing.merged.name, pairing.kind, case, actual, orders, measure)


@contextmanager
def one_thread() -> Iterator[None]:
    """One intra-op thread for each worker: a parallel region inside the tile loop stalls on shared cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

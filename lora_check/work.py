"""One work item: load a pairing, compare it, name the mistake if it is refuted. Pure but for reading its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_check import registry
from lora_check.compare import Measure, compare, compare_copy, likely
from lora_check.device import demand
from lora_check.diagnose import Known, name_tensor, not_finite
from lora_check.findings import Diagnosis
from lora_check.first_pass import Part, copy_part, part, whole
from lora_check.items import Item, pieces, rows_are_enough
from lora_check.loading import Files
from lora_check.nonfinite import overflowed, sources
from lora_check.overlap import beyond
from lora_check.quantised import grid_of
from lora_check.requantised import measure_again, measure_codes, measure_stored
from lora_check.rounding import ADD, FORMATS, arithmetics, conversions
from lora_check.sources import rows_of
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
    Verdict,
)

UNMOVED = "unmoved"
"""What is told of codes that are those of BASE, byte for byte, though an adapter was to be merged into them."""
TIED = "tied"
"""The key under which `alike` lists an embedding's head, and a head's embedding."""

SAMPLES = 3
"""Targets whose first rows are asked which arithmetic made the model, before the pass begins."""


SESSION = "the session that trained the adapter, before its patterns were sorted"
"""Who may have taken another of several patterns that match one module."""


@dataclass(frozen=True, slots=True)
class Refuted:
    """A tensor whose mistake is to be named."""

    pairing: Pairing
    measure: Measure


@dataclass(frozen=True, slots=True)
class Outcome:
    """One tensor, compared; if it is refuted, the numbers that refute it."""

    comparison: Comparison
    refuted: Measure | None = None


@dataclass(frozen=True, slots=True)
class Glimpse:
    """What the first pass saw of some rows, and the arithmetic that it took."""

    part: Part
    arithmetic: str


Seen = Glimpse | bool | None
"""Of some rows: what the first pass saw, or of a bystander's that they are the same; None: they want a closer look."""

Result = Outcome | Seen | Diagnosis
"""Of an item: a tensor's outcome, what was seen of some rows, or the mistake, None if there is none."""


@dataclass(frozen=True, slots=True)
class Job(Files):
    """The opened inputs and their plan, and for each pair of dtypes the arithmetic to try first."""

    plan: Plan
    hints: Mapping[tuple[str, str], Arithmetic]
    device: str = "cpu"
    alike: Mapping[tuple[Any, ...], Sequence[Pairing]] = field(default_factory=dict)

    def perform(self, item: Item) -> Result:
        """Do one piece of work."""
        pairing = self.plan.pairings[item.place]
        if item.measure is not None:
            return self.diagnosis(Refuted(pairing, item.measure), item.known)
        return self.outcome(pairing) if item.rows is None else self.part(pairing, slice(*item.rows))

    def part(self, pairing: Pairing, rows: slice) -> Seen:
        """What the first pass sees of some rows, which alone are read."""
        case, actual = self.by_rows(pairing)
        if pairing.kind != "target":
            return copy_part(case, actual, rows) or None
        how = self.hints.get(_dtypes(pairing))
        found = part(case, actual, how, rows, self.device) if how in orders_for(pairing) else None
        return Glimpse(found, how.name) if found and how else None

    def joined(self, pairing: Pairing, seen: Sequence[Any]) -> Outcome | None:
        """The outcome of a tensor of which every row was seen; None: it wants a closer look."""
        if pairing.kind == "target":
            measure = _whole(pairing, seen)
        else:
            how = self.hints.get(_dtypes(pairing), ADD)
            measure = Measure(fits=True, exact=True, arithmetic=how.name) if seen and all(seen) else None
        return Outcome(_comparison(pairing, measure)) if measure else None

    def outcome(self, pairing: Pairing) -> Outcome:
        """Compare one tensor; never verified where MERGED has more or fewer rows than it should."""
        found = self.compared(pairing)
        if not pairing.wanted:
            return found
        rows = rows_of(self.merged.read(pairing.merged.name))
        seen = replace(found.comparison, beyond=beyond(rows, pairing.rows or 0, pairing.wanted[0]))
        return replace(found, comparison=seen if found.refuted else replace(seen, verdict=Verdict.INCONCLUSIVE))

    def compared(self, pairing: Pairing) -> Outcome:
        """Compare the rows of one tensor that MERGED has and should have."""
        if pairing.undecidable:
            return Outcome(self.undecided(pairing))
        if rows_are_enough(pairing) and (found := self.joined(pairing, [*self._parts(pairing)])):
            return found
        if (copied := self.copied(pairing)) is not None:
            return Outcome(_comparison(pairing, copied))
        case, actual = self.seen(pairing)
        orders = orders_for(pairing)
        measure = self.measure(pairing, case, actual, orders)
        if measure.fits:
            return Outcome(_comparison(pairing, measure))
        for release, changed in self.older(pairing, case):
            other = self.measure(pairing, changed, actual, orders)
            if other.fits:
                return Outcome(replace(_comparison(pairing, other), release=release))
        if (again := self.quantised_again(pairing, case, actual, orders)) is not None:
            return Outcome(_comparison(pairing, again))
        return Outcome(_comparison(pairing, measure), measure)

    def _parts(self, pairing: Pairing) -> Iterator[Seen]:
        """Piece by piece, up to the first that wants a closer look."""
        for rows in pieces(pairing):
            yield (seen := self.part(pairing, rows))
            if seen is None:
                return

    def undecided(self, pairing: Pairing) -> Comparison:
        """What nobody here can recompute; of codes that nothing decodes, whether they are BASE's own."""
        ours, theirs = self.in_codes(pairing)
        comparison = _undecided(pairing)
        if pairing.kind != "target" or ours is None or theirs is None or ours.scheme is not theirs.scheme:
            return comparison
        return replace(comparison, told={UNMOVED: True}) if measure_stored(ours, theirs).fits else comparison

    def diagnosis(self, refuted: Refuted, known: Known | None = None) -> Diagnosis | None:
        """Name the mistake in one tensor, which is read once more: any, or one of those that are known."""
        pairing, measure = refuted.pairing, refuted.measure
        name = pairing.merged.name
        if measure.nonfinite:
            return not_finite(name, measure.nonfinite, sources(*self.load(pairing)))
        case, actual = self.load(pairing)
        asked = self.with_circumstances(pairing, case)
        return name_tensor(name, pairing.kind, asked, actual, orders_for(pairing), measure, known)

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
                Peer(tensor=one.merged.name, module=one.module, steps=partial(self.steps, one)) for one in others
            ),
            tied=next((self._tied(one) for one in self.alike.get((TIED, pairing.merged.name), ())), None),
        )

    def _tied(self, pairing: Pairing) -> Peer:
        base = partial(self.rows_of_base, pairing.base.name) if pairing.base else None
        return Peer(tensor=pairing.merged.name, module=pairing.module, steps=partial(self.steps, pairing), base=base)

    def older(self, pairing: Pairing, case: Case) -> Iterator[tuple[str, Case]]:
        """The case as other releases take the same adapter, unless it names its own, and as other machines do."""
        told = [bool(self.adapters[step.adapter].config.producer) for step in pairing.steps]
        known = [
            {**step.recipe.anywhere, **({} if recorded else step.recipe.releases)}
            for step, recorded in zip(case.steps, told, strict=True)
        ]
        for name in dict.fromkeys(name for one in known for name in one):
            steps = tuple(one[name](step) if name in one else step for step, one in zip(case.steps, known, strict=True))
            if any(taken is not step for taken, step in zip(steps, case.steps, strict=True)):
                yield name, replace(case, steps=steps)
        for alpha in dict.fromkeys(one for step in case.steps if step.scale for one in step.scale.other_alphas):
            yield SESSION, replace(case, steps=tuple(_with_alpha(step, alpha) for step in case.steps))
        if (TIED, pairing.merged.name) in self.alike and (own := _own_steps(pairing, case)) != case.steps:
            yield "", replace(case, steps=own)

    def copied(self, pairing: Pairing) -> Measure | None:
        """Numbers for a tensor that no adapter touches and that both files keep in the same kind of codes.

        None where it may be no copy, but decoded and quantised once more.
        """
        ours, theirs = self.in_codes(pairing)
        if pairing.steps or ours is None or theirs is None or ours.coded.meta.codes != theirs.coded.meta.codes:
            return None
        seen = measure_stored(ours, theirs)
        return seen if seen.fits or not theirs.grid_is_known else None

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
            seen = compare_copy(case, actual, conversions(*_dtypes(pairing)) if modelled else orders)
            lost = overflowed(case, actual) if seen.fits else 0
            return replace(seen, fits=False, exact=False, over_budget=lost, nonfinite=lost) if lost else seen
        return compare(case, actual, orders, self.hints.get(_dtypes(pairing)))


def kin(pairing: Pairing) -> tuple[Any, ...]:
    """What two targets share if the factors of one fit the other."""
    return pairing.merged.shape, pairing.recipe, len(pairing.steps)


def alike(plan: Plan) -> dict[tuple[Any, ...], list[Pairing]]:
    """The targets whose factors could be mistaken for one another, together."""
    groups: dict[tuple[Any, ...], list[Pairing]] = {}
    for pairing in plan.targets:
        if not pairing.undecidable:
            groups.setdefault(kin(pairing), []).append(pairing)
    return groups | tied(plan)


def tied(plan: Plan) -> dict[tuple[Any, ...], list[Pairing]]:
    """For each head that can be tied to its embedding, and the embedding, the other of the two."""
    pairings = {one.merged.name: one for one in plan.pairings if not one.undecidable}
    metas = {name: one.merged for name, one in pairings.items()}
    resolve = registry.load("layouts")["tied-head"].resolve
    pairs = {name: resolve(name, metas, {}) for name in pairings}
    return {
        (TIED, name): [pairings[other]]
        for name, other in pairs.items()
        if other and metas[other].shape == metas[name].shape
    }


def _own_steps(pairing: Pairing, case: Case) -> tuple[LoadedStep, ...]:
    """Without the deltas of the tensor that is tied to this one: MERGED has both, and unmerged each has its own."""

    def foreign(step: LoadedStep) -> bool:
        if step.recipe.copies or step.site is None or step.site.settings.get("ensure_weight_tying"):
            return False
        return _last(step.site.parameter) != _last(pairing.merged.name)

    return tuple(step for step in case.steps if not foreign(step))


def _last(name: str) -> list[str]:
    """The module's own name and the parameter's."""
    return name.rsplit(".", 2)[-2:]


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
    recipes = [step.recipe for step in pairing.steps]
    others, combines = any(one.method for one in recipes), any(one.combines for one in recipes)
    return arithmetics(storage, base, others=others, combines=combines)


def _whole(pairing: Pairing, seen: Sequence[Glimpse | None]) -> Measure | None:
    """What its rows make of a target; None: some want a closer look, or were seen under different arithmetics."""
    taken = {one.arithmetic if one else "" for one in seen}
    how = next((one for one in orders_for(pairing) if {one.name} == taken), None)
    found: Measure | None = whole([one.part if one else None for one in seen], how) if how else None
    return found


def _dtypes(pairing: Pairing) -> tuple[str, str]:
    return pairing.merged.dtype, (pairing.base or pairing.merged).dtype


def job(
    base: Checkpoint,
    adapters: tuple[Adapter, ...],
    merged: Checkpoint,
    plan: Plan,
    hints: Mapping[tuple[str, str], Arithmetic] | None = None,
    device: str = "cpu",
) -> Job:
    """All that an item needs.

    hints   for each pair of dtypes the arithmetic to try first; None: the first rows of the first targets tell
    """
    demand(device)
    bare = Job(base, adapters, merged, plan, {}, device)
    return replace(bare, hints=_hints(bare) if hints is None else hints, alike=alike(plan))


def _hints(bare: Job) -> Mapping[tuple[str, str], Arithmetic]:
    groups: dict[tuple[str, str], list[Pairing]] = {}
    for pairing in bare.plan.targets:
        if not pairing.undecidable:
            groups.setdefault(_dtypes(pairing), []).append(pairing)
    return {
        dtypes: likely([bare.seen(one) for one in members[:SAMPLES]], orders_for(members[0]))
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


@contextmanager
def one_thread() -> Iterator[None]:
    """One intra-op thread for each worker: a parallel region inside the tile loop stalls on shared cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

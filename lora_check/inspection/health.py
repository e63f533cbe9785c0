"""What is wrong with an adapter by itself, or against its base: findings where they have a code, remarks where not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_check import registry
from lora_check.adapters.methods import UNMERGEABLE
from lora_check.adapters.read import bind
from lora_check.faults._findings import found, listed, many
from lora_check.findings import structural
from lora_check.inspection.modules import Module
from lora_check.types import Adapter, Checkpoint, Finding, Plan, Severity

if TYPE_CHECKING:
    from torch import Tensor

    from lora_check.inspection.cores import Spectrum

ABOUT_ADAPTERS = ("LC001", "LC002", "LC003", "LC005", "LC006", "LC205", "LC301")
"""The structural faults that an adapter and its base can have before anything is merged."""
ALONE = ("LC002", "LC003", "LC005")
"""Those of them that show without a base."""
ABOUT_NAMES = ("LC005", "LC006", "LC205")
"""Those that are about the names of tensors: a prompt and a router have none of modules, and are not at fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """Something that is wrong, or odd, and has no code, for no merge is at hand."""

    severity: Severity
    name: str
    message: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """What reading one tensor showed: how many of its numbers are not finite, zero, subnormal."""

    numbers: int
    nonfinite: int
    zeros: int
    subnormals: int


def laid_over(adapter: Adapter, base: Checkpoint) -> tuple[Adapter, Plan]:
    """The adapter with its modules named as in the base, and the plan of a merge that is the base itself."""
    from lora_check.plan import make_plan

    return bind(adapter, base), make_plan(base, [adapter], base)


def alone(adapter: Adapter, modules: Sequence[Module]) -> Plan:
    """What is known of a merge without its base: the adapter, and where its configuration contradicts its tensors."""
    return Plan(pairings=(), adapters=(adapter,), contradictions=tuple(_contradictions(adapter, modules)))


def by_headers(plan: Plan, *, with_base: bool) -> list[Finding]:
    """What headers and configurations show."""
    wanted = ABOUT_ADAPTERS if with_base else ALONE
    found = [one for one in structural(plan) if one.code in wanted]
    if any(one.config.method in UNMERGEABLE for one in plan.adapters):
        return [one for one in found if one.code not in ABOUT_NAMES]
    return found


def of_tensors(
    plan: Plan, modules: Sequence[Module], sound: Mapping[str, Sound], spectra: Mapping[str, Spectrum]
) -> list[Finding]:
    """What the numbers show and has a code: no delta anywhere, factors that underflowed."""
    faults = registry.load("faults")
    zero = [one for one in modules if _is_zero(one, sound)]
    known = [one for one in modules if one.name in spectra or one in zero]
    told = []
    if zero and len(zero) == len(known) == len(modules):
        message = f"the adapter's delta is zero in every target, {len(zero)} in all"
        told.append(found(faults["LC004"], message, _factors(zero), targets=len(zero)))
    return [*told, *faults["LC169"].detect(plan, ())]


def remarks(
    adapter: Adapter,
    modules: Sequence[Module],
    sound: Mapping[str, Sound],
    spectra: Mapping[str, Spectrum],
    *,
    with_base: bool,
) -> list[Remark]:
    """What has no code."""
    told = [
        *_unfinished(modules),
        *_without_factors(adapter, modules),
        *([] if with_base else _unread(adapter)),
        *_nonfinite(sound),
        *_zeros(modules, sound),
        *_subnormal(adapter, sound),
        *_collapsed(modules, spectra),
    ]
    order = ("error", "warning", "info")
    return sorted(told, key=lambda one: order.index(one.severity))


def examined(tensor: Tensor) -> Sound | None:
    """Count what a number can be that it should not be; None: torch cannot read numbers of that dtype."""
    import torch

    from lora_check.rounding import FORMATS

    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in FORMATS and tensor.is_floating_point():
        try:
            tensor = tensor.to(torch.float64)  # torch has no arithmetic for 8-bit floats
        except NotImplementedError:
            return None
    zeros, inexact = int((tensor == 0).sum()), tensor.is_floating_point() or tensor.is_complex()
    small = int((tensor.abs() < 2.0 ** FORMATS[dtype].least_exponent).sum()) - zeros if dtype in FORMATS else 0
    broken = int((~torch.isfinite(tensor)).sum()) if inexact else 0
    return Sound(numbers=tensor.numel(), nonfinite=broken, zeros=zeros, subnormals=small)


# --------------------------------------------------------------------------------------------------------- by name


def _contradictions(adapter: Adapter, modules: Sequence[Module]) -> Iterator[str]:
    """Where configuration and tensors disagree whatever the base is; with a base the plan has these and more."""
    from lora_check.adapters.scale import scale_of

    for one in modules if adapter.config.method == "LORA" else ():
        said, a = scale_of(adapter, one.name).rank, one.shapes[one.pair[1]] if one.pair else ()
        if a and one.plain and one.name not in adapter.scales and a[0] != said:
            yield f"{one.name}: the configuration says r = {said}, lora_A has {a[0]} rows"
        if one.pair and adapter.dialect == "peft" and adapter.config.dora != ("m" in one.shapes):
            said_so = "says DoRA, and there is no" if adapter.config.dora else "does not say DoRA, and there is a"
            yield f"{one.name}: the configuration {said_so} magnitude"


def _unfinished(modules: Sequence[Module]) -> Iterator[Remark]:
    lone = [one for one in modules if one.pair is None and {"A", "B", "embedding_A", "embedding_B"} & one.shapes.keys()]
    if lone:
        yield _remark("error", "unpaired", f"{_in(lone)} have one factor of two", lone)
    unlike = [one for one in modules if one.pair and not one.plain and one.why.startswith("B (")]
    if unlike:
        yield _remark("error", "no-product", f"{_in(unlike)}: {unlike[0].why}", unlike)


def _without_factors(adapter: Adapter, modules: Sequence[Module]) -> Iterator[Remark]:
    """A file of whole tensors: a model under the configuration of an adapter, or what a method trains whole."""
    if adapter.parts and not modules:
        message = f"no factors: {many(len(adapter.parts), 'tensor')} carried whole, as a model holds them"
        lost = adapter.config.method == "LORA"  # PEFT loads such a file, and B of every target is zero
        yield Remark(severity="error" if lost else "warning", name="no-factors", message=message)


def _unread(adapter: Adapter) -> Iterator[Remark]:
    """Tensors that no formula reads; with a base LC205 tells them."""
    names = adapter.orphans
    if names:
        message = f"{many(len(names), 'tensor')} that nothing reads: {listed(names, limit=2)}"
        yield Remark(severity="error", name="unread", message=message, tensors=names)


# -------------------------------------------------------------------------------------------------------- by number


def _nonfinite(sound: Mapping[str, Sound]) -> Iterator[Remark]:
    broken = {name: one.nonfinite for name, one in sound.items() if one.nonfinite}
    if broken:
        count = sum(broken.values())
        message = f"{many(count, 'number')} of {many(len(broken), 'tensor')} that {_is(count)} NaN or infinite"
        yield Remark(severity="error", name="not-finite", message=message, tensors=tuple(broken))


def _zeros(modules: Sequence[Module], sound: Mapping[str, Sound]) -> Iterator[Remark]:
    zero = [one for one in modules if _is_zero(one, sound)]
    if zero and len(zero) < len(modules):
        which = {one.family for one in zero}
        message = (
            f"no delta in {_in(zero)} of {len(modules)}, for a factor or the scale is zero: {listed(sorted(which))}"
        )
        yield _remark("warning", "zero-delta", message, zero)


def _subnormal(adapter: Adapter, sound: Mapping[str, Sound]) -> Iterator[Remark]:
    """Numbers of a few bits; in fp16, where they are many, LC169 tells them too."""
    small = {name: one for name, one in sound.items() if one.subnormals}
    if small:
        count, numbers = (sum(getattr(one, key) for one in small.values()) for key in ("subnormals", "numbers"))
        message = f"{count} of {numbers} numbers of {many(len(small), 'tensor')} are subnormal: they have lost bits"
        yield Remark(severity="info", name="subnormal", message=message, tensors=tuple(small))


def _collapsed(modules: Sequence[Module], spectra: Mapping[str, Spectrum]) -> Iterator[Remark]:
    """Products of a lower rank than they have room for: surely, or as far as the storage of the factors tells."""
    known = [(one, spectra[one.name]) for one in modules if one.name in spectra and spectra[one.name].norm > 0]
    sure = [(one, seen) for one, seen in known if seen.rank < _room(one)]
    if sure:
        one, seen = min(sure, key=lambda pair: pair[1].rank / _room(pair[0]))
        message = (
            f"B A has a lower rank than it has room for in {_in([one for one, _ in sure])}: "
            f"{seen.rank} of {_room(one)} in {one.name}"
        )
        yield _remark("warning", "rank-collapse", message, [one for one, _ in sure])
    vague = [(one, seen) for one, seen in known if seen.resolved < seen.rank]
    if vague:
        one, seen = min(vague, key=lambda pair: pair[1].resolved / _room(pair[0]))
        message = (
            f"the smallest directions of B A are no larger than what storing its factors can make in "
            f"{_in([one for one, _ in vague])}: {seen.resolved} of {seen.rank} stand out in {one.name}"
        )
        yield _remark("info", "rank-unresolved", message, [one for one, _ in vague])


def _room(module: Module) -> int:
    return min(module.rank, *module.sides)


def _is_zero(module: Module, sound: Mapping[str, Sound]) -> bool:
    """Whether a factor of a pair was read and is zero throughout, or the scale is."""
    read = [sound.get(module.parts[role].tensor) for role in module.pair or ()]
    unscaled = module.pair is not None and module.scale is not None and module.scale.value == 0
    return unscaled or any(one is not None and 0 < one.numbers == one.zeros for one in read)


def _factors(modules: Sequence[Module]) -> tuple[str, ...]:
    return tuple(part.tensor for one in modules for part in one.parts.values())


def _remark(severity: Severity, name: str, message: str, modules: Sequence[Module]) -> Remark:
    return Remark(severity=severity, name=name, message=message, tensors=_factors(modules))


def _in(modules: Sequence[Module]) -> str:
    return many(len(modules), "module")


def _is(count: int) -> str:
    return "is" if count == 1 else "are"

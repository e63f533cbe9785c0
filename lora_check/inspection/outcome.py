"""An inspection: opened, gathered, measured; and its JSON form. Keys are those of a report where they apply."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from lora_check.inspection.attach import Attached
from lora_check.inspection.health import Remark, Sound
from lora_check.inspection.model import Model
from lora_check.inspection.modules import Gathered, Module
from lora_check.inspection.predict import Predicted
from lora_check.report import SCHEMA, finding_as_dict
from lora_check.types import Adapter, Checkpoint, Finding
from lora_check.versions import versions

if TYPE_CHECKING:
    from lora_check.inspection.cores import Spectrum
    from lora_check.inspection.leading import Alignment

CLEAN, WRONG, UNSEEN = 0, 1, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The modules of one name, pooled.

    energy      share of the sum of |s B A|_F^2 that rank 1, 2, ... keeps in each of them; empty: not measured
    relative    sqrt(sum |s B A|_F^2 / sum |W|_F^2)
    """

    name: str
    modules: int
    sides: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    scales: tuple[float, ...]
    parameters: int
    spectra: int
    rank: tuple[int, int] | None
    effective_rank: float | None
    stable_rank: float | None
    energy: tuple[float, ...]
    norm: float | None
    relative: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """All that was seen.

    model     the parameters of the base, or of the checkpoint itself
    unseen    what was to be looked at and could not be      apart   what an inspection of this alone does not look at
    sound     adapter tensor -> what reading it showed
    listed    what is told one by one: "parameters", "spectra"
    """

    location: str
    adapter: Adapter | None = None
    base: Checkpoint | None = None
    model: Model | None = None
    gathered: Gathered | None = None
    sound: Mapping[str, Sound] = field(default_factory=dict)
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    alignments: Mapping[str, Alignment] = field(default_factory=dict)
    attached: Attached | None = None
    predicted: Predicted | None = None
    findings: tuple[Finding, ...] = ()
    remarks: tuple[Remark, ...] = ()
    unseen: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    listed: frozenset[str] = frozenset()

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules that the adapter has factors for."""
        return self.gathered.modules if self.gathered else ()

    @property
    def trained(self) -> int | None:
        """How many numbers the adapter file holds; of a configuration alone, how many it would."""
        if self.adapter is None:
            return None
        metas = self.adapter.checkpoint.metas()
        if metas:
            return sum(meta.numel for meta in metas.values())
        return sum(prod(one.shape) for one in self.attached.trained) if self.attached else None

    @property
    def families(self) -> tuple[Family, ...]:
        """In the order of their first module."""
        groups: dict[str, list[Module]] = {}
        for one in self.modules:
            groups.setdefault(one.family, []).append(one)
        return tuple(self._family(name, members) for name, members in groups.items())

    @property
    def exit_code(self) -> int:
        """1 where something is wrong, 3 where something could not be looked at, else 0."""
        severities = {*(one.severity for one in self.findings), *(one.severity for one in self.remarks)}
        if "error" in severities:
            return WRONG
        return UNSEEN if self.unseen else CLEAN

    def _family(self, name: str, members: Sequence[Module]) -> Family:
        spectra = [self.spectra[one.name] for one in members if one.name in self.spectra]
        aligned = [self.alignments[one.name] for one in members if one.name in self.alignments]
        scales = [one.scale for one in members if one.scale]
        moved = [one for one in members if one.name in self.alignments]
        size = math.hypot(*(self.spectra[one.name].norm for one in moved))
        return Family(
            name=name,
            modules=len(members),
            sides=_distinct(one.sides[::-1] for one in members if one.pair and one.plain),
            ranks=_distinct(one.rank for one in members if one.rank),
            alphas=_distinct(one.alpha for one in scales),
            scales=_distinct(one.value for one in scales),
            parameters=sum(one.parameters for one in members),
            spectra=len(spectra),
            rank=(min(one.resolved for one in spectra), max(one.resolved for one in spectra)) if spectra else None,
            effective_rank=_mean(one.effective_rank for one in spectra),
            stable_rank=_mean(one.stable_rank for one in spectra),
            energy=_pooled([one.values for one in spectra]),
            norm=math.hypot(*(one.norm for one in spectra)) if spectra else None,
            relative=size / math.hypot(*(one.weight for one in aligned)) if aligned else None,
        )

    def as_dict(self) -> dict[str, Any]:
        """The inspection as JSON has it: every module, and the parameters where they are listed."""
        parameters = "parameters" in self.listed
        told = {
            "schema": SCHEMA,
            "tool": versions(),
            "command": "inspect",
            "inputs": self._inputs(),
            "exit_code": self.exit_code,
            "summary": self._summary(),
            "families": [_family_dict(one) for one in self.families],
            "modules": [self._module(one) for one in self.modules],
            "findings": [finding_as_dict(one) for one in self.findings],
            "remarks": [asdict(one) | {"count": len(one.tensors)} for one in self.remarks],
            "not_looked_at": [*self.unseen, *self.apart],
        }
        if parameters and self.attached:
            told["parameters"] = [asdict(one) for one in self.attached.parameters]
        elif parameters and self.model:
            told["parameters"] = [{"name": name, "shape": shape} for name, shape in self.model.parameters.items()]
        if self.predicted:
            told["prediction"] = _prediction(self.predicted)
        return told

    def _inputs(self) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if self.adapter:
            config = self.adapter.config
            told["adapter"] = _described(self.adapter.checkpoint) | {
                "dialect": self.adapter.dialect,
                "method": config.method,
                "rank": config.rank or config.raw.get("r"),
                "alpha": config.alpha,
                "rslora": config.rslora,
                "dora": config.dora,
                "base": config.base_name,
                "producer": config.producer,
            }
        if self.model:
            held = _described(self.base) if self.base else {"location": self.model.location}
            told["base" if self.adapter else "checkpoint"] = held | {"shapes_from": self.model.told_by}
        return told

    def _summary(self) -> dict[str, Any]:
        whole = self.gathered.whole if self.gathered else ()
        return {
            "parameters": self.model.size if self.model else None,
            "trained": self.trained,
            "modules": len(self.modules),
            "saved_whole": len(whole),
            "spectra": len(self.spectra),
        }

    def _module(self, one: Module) -> dict[str, Any]:
        spectrum, alignment = self.spectra.get(one.name), self.alignments.get(one.name)
        return {
            "name": one.name,
            "family": one.family,
            "shapes": {role: list(shape) for role, shape in one.shapes.items()},
            "rank": one.rank,
            "alpha": one.scale.alpha if one.scale else None,
            "scale": _finite(one.scale.value) if one.scale else None,
            "rule": one.scale.rule if one.scale else None,
            "parameters": one.parameters,
            "why_no_spectrum": one.why or None,
            "spectrum": _spectrum(spectrum) if spectrum else None,
            "beside_base": asdict(alignment) if alignment else None,
        }


def _family_dict(one: Family) -> dict[str, Any]:
    return {"family": one.name, **{key: value for key, value in asdict(one).items() if key != "name"}}


def _spectrum(one: Spectrum) -> dict[str, Any]:
    return {
        "values": list(one.values),
        "error": one.error,
        "noise": one.noise,
        "rank": one.rank,
        "resolved": one.resolved,
        "energy": list(one.energy),
        "effective_rank": one.effective_rank,
        "stable_rank": one.stable_rank,
        "norm": one.norm,
    }


def _prediction(one: Predicted) -> dict[str, Any]:
    return {
        "full": one.full,
        "targets": [asdict(target) | {"for_each_rank": target.for_each_rank} for target in one.targets],
        "ranks": [asdict(rank) for rank in one.ranks],
    }


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    metas = checkpoint.metas().values()
    return {
        "location": checkpoint.location,
        "tensors": len(metas),
        "bytes": sum(meta.nbytes for meta in metas),
        "dtypes": sorted({meta.stored_as for meta in metas}),
    }


def _distinct(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _pooled(spectra: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Share of all energy that each rank keeps, of several spectra cut alike."""
    longest = max((len(one) for one in spectra), default=0)
    squares = [math.fsum(one[k] ** 2 for one in spectra if k < len(one)) for k in range(longest)]
    total = math.fsum(squares)
    return tuple(math.fsum(squares[: k + 1]) / total for k in range(longest)) if total > 0 else ()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

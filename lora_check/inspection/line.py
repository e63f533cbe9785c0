"""The line of an inspection: open, gather, attach, predict, read, measure. Headers first; of a base only what is asked.

An adapter is read whole, for its health; W of the base only for spectra. Nothing is merged, so nothing is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_check.adapters.config import changes_base, parse_config
from lora_check.adapters.read import read_adapter
from lora_check.errors import AdapterConfigError, InputError, UnknownFormatError, UsageError, WrongInputError
from lora_check.inspection import health
from lora_check.inspection.attach import Attached, attach
from lora_check.inspection.model import Model, of_folder, of_headers, of_table
from lora_check.inspection.modules import Module, Place, factors, gather, places
from lora_check.inspection.outcome import Inspection
from lora_check.inspection.predict import Predicted, predict
from lora_check.locations import ADAPTER_CONFIG, ADAPTERS, Role, open_checkpoint, read_adapter_config, resolve
from lora_check.quantised import decoded
from lora_check.types import Adapter, Checkpoint, Plan, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

    from lora_check.inspection.cores import Core, Spectrum
    from lora_check.inspection.leading import Alignment

Progress = Callable[..., AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked of an inspection.

    base      the model that the adapter belongs to      shapes   or a table of its shapes
    targets, ranks   adapters to predict; without targets, those of the adapter's configuration
    extra     rows for more tokens                       beside   measure the updates beside their weights
    """

    base: str | None = None
    shapes: str | None = None
    targets: str | tuple[str, ...] | None = None
    ranks: tuple[int, ...] = ()
    extra: int = 0
    beside: bool = False


class Nothing:
    """A checkpoint without tensors: a configuration that stands alone."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.config: Mapping[str, Any] = {}

    def metas(self) -> Mapping[str, TensorMeta]:
        """None."""
        return {}

    def read(self, name: str) -> Tensor:
        """Nothing can be."""
        raise InputError(f"{self.location} has no tensor {name!r}", hint="name a folder with tensors")

    def close(self) -> None:
        """Nothing is open."""


def inspect(location: str | None, wanted: Wanted, progress: Progress | None = None) -> Inspection:
    """What an adapter or a checkpoint is.

    location  either of them; None: the table of shapes alone
    raises    UsageError, InputError: it is neither, or something that was asked for cannot be
    """
    with ExitStack() as stack:
        adapter = _adapter(location, stack) if location else None
        base, model = _base(location if adapter is None else wanted.base, wanted, stack)
        if adapter is None:
            return _of_model(str(location or wanted.shapes), base, model, wanted)
        return _of_adapter(adapter, base, model, wanted, progress)


def _of_model(location: str, base: Checkpoint | None, model: Model | None, wanted: Wanted) -> Inspection:
    assert model is not None
    if wanted.beside:
        raise UsageError(f"spectra are those of an adapter, and {location} is none", hint="leave --spectra, --plot out")
    if wanted.base:
        raise UsageError(f"--base is that of an adapter, and {location} is none", hint="leave --base out")
    if wanted.ranks and not wanted.targets:
        raise UsageError("--ranks without --targets: a checkpoint names no targets", hint="--targets q_proj,v_proj")
    predicted = predict(model, wanted.targets, wanted.ranks or (1,)) if wanted.targets else None
    return Inspection(
        location=location,
        base=base,
        model=model,
        predicted=predicted,
        unseen=() if model.parameters else ("anything: it holds no parameter",),
        apart=("its numbers: only names and shapes are read",),
    )


def _of_adapter(
    adapter: Adapter, base: Checkpoint | None, model: Model | None, wanted: Wanted, progress: Progress | None
) -> Inspection:
    bound, plan = health.laid_over(adapter, base) if base else (adapter, None)
    gathered = gather(bound)
    plan = plan or health.alone(bound, gathered.modules)
    attached, unnamed = _attached(model, adapter)
    seen = Inspection(
        location=adapter.location,
        adapter=bound,
        base=base,
        model=model,
        gathered=gathered,
        attached=attached,
        predicted=_predicted(model, adapter, wanted),
        findings=tuple(health.by_headers(plan, with_base=base is not None)),
    )
    if isinstance(adapter.checkpoint, Nothing):
        unread = "no tensors lie beside the configuration: health and spectra are not known"
        return replace(seen, findings=(), unseen=(*unnamed, unread))
    return _measured(seen, plan, unnamed, wanted, progress)


def _measured(
    seen: Inspection, plan: Plan, unnamed: Sequence[str], wanted: Wanted, progress: Progress | None
) -> Inspection:
    """The same, with what the numbers of the adapter show."""
    assert seen.adapter is not None
    from lora_check.work import one_thread

    with one_thread():
        looked = _look(seen.adapter, seen.modules, _weights(seen.base, plan, wanted), progress)
    remarks = health.remarks(seen.adapter, seen.modules, looked.sound, looked.spectra, with_base=seen.base is not None)
    findings = health.of_tensors(plan, seen.modules, looked.sound, looked.spectra)
    return replace(
        seen,
        sound=looked.sound,
        spectra=looked.spectra,
        alignments=looked.alignments,
        findings=(*seen.findings, *findings),
        remarks=tuple(remarks),
        unseen=(
            *unnamed,
            *seen.adapter.config.unsupported,
            *(f"{name}: numbers of its dtype cannot be read" for name in looked.strange),
            *_without_spectrum(seen.modules, looked),
        ),
        apart=tuple(_apart(seen, wanted)),
    )


def _apart(seen: Inspection, wanted: Wanted) -> Iterator[str]:
    """What the question leaves out, and how to ask it."""
    if seen.base is None:
        yield f"whether its tensors name modules of a base ({'BASE has no weights' if wanted.base else '--base BASE'})"
    elif not wanted.beside:
        yield "how large its updates are beside their weights (--spectra)"
    if seen.adapter and changes_base(seen.adapter.config.raw):
        yield "what the base loses as the adapter is loaded: the spectra are those of s B A, not of the whole change"
    if seen.adapter and seen.adapter.config.dora:
        yield "what DoRA's magnitudes do: the spectra are those of s B A, before W + s B A is scaled"
    if seen.model is None:
        yield "the parameters of the model that it is attached to (--base BASE, or --shapes FILE)"


# ------------------------------------------------------------------------------------------------------------ open


def _adapter(location: str, stack: ExitStack) -> Adapter | None:
    """The adapter that lies at a location, with or without tensors; None: it is something else."""
    if _configuration(location) is not None:
        return None
    if Path(location).name == ADAPTER_CONFIG and Path(location).is_file():
        location = str(Path(location).parent)
    place = resolve(location, role="adapter")
    folder, configured = place.is_dir(), (place / ADAPTER_CONFIG).is_file()
    if folder and not configured and not any((place / name).is_file() for name in ADAPTERS):
        return None
    try:
        opened = stack.enter_context(closing(open_checkpoint(location, role="adapter")))
        return read_adapter(opened)
    except UnknownFormatError:
        if not configured:
            raise
        return _alone(place, location)
    except (AdapterConfigError, WrongInputError):
        if folder or place.name in ADAPTERS:
            raise
        return None  # a file may as well be a checkpoint


def _alone(place: Path, location: str) -> Adapter:
    """adapter_config.json without tensors."""
    config = parse_config(read_adapter_config(place), location)
    return Adapter(config=config, checkpoint=Nothing(location), dialect="peft", parts=())


def _base(location: str | None, wanted: Wanted, stack: ExitStack) -> tuple[Checkpoint | None, Model | None]:
    """The base, or the checkpoint that is looked at: opened where it has weights, and its parameters."""
    if wanted.shapes:
        return None, of_table(wanted.shapes).grown(wanted.extra)
    if location is None:
        return None, None
    if (alone := _configuration(location)) is not None:
        return None, of_folder(alone.parent, None).grown(wanted.extra)
    opened = _opened(location, "base", stack)
    if opened is None:
        return None, of_folder(resolve(location, role="base"), None).grown(wanted.extra)
    seen, _ = decoded(opened, opened)
    return seen, of_headers(seen).grown(wanted.extra)


def _configuration(location: str) -> Path | None:
    """The config.json that a location names: what lies beside it is not asked."""
    place = Path(location)
    return place if place.name == "config.json" and place.is_file() else None


def _opened(location: str, role: Role, stack: ExitStack) -> Checkpoint | None:
    """A checkpoint with weights; None: a folder that has but a config.json."""
    try:
        return stack.enter_context(closing(open_checkpoint(location, role=role)))
    except UnknownFormatError:
        place = resolve(location, role=role)
        if place.is_dir() and (place / "config.json").is_file():
            return None
        raise


# --------------------------------------------------------------------------------------------------------- predict


def _attached(model: Model | None, adapter: Adapter) -> tuple[Attached | None, tuple[str, ...]]:
    """The parameters of the base with this adapter, and why they could not be told."""
    if model is None:
        return None, ()
    if adapter.dialect != "peft":
        return None, (f"PEFT's names for parameters: the adapter is written as {adapter.dialect} writes them",)
    try:
        found = attach(model, adapter.config)
    except InputError as error:
        return None, (f"PEFT's names for parameters: {error.message}",)
    return (None, found.reasons) if found.reasons else (found, ())


def _predicted(model: Model | None, adapter: Adapter, wanted: Wanted) -> Predicted | None:
    if not wanted.ranks and not wanted.targets:
        return None
    if model is None:
        raise UsageError("sizes are predicted from the shapes of a base, and none is given", hint="--base BASE")
    targets = wanted.targets or adapter.config.raw.get("target_modules") or ()
    return predict(model, targets if isinstance(targets, str) else tuple(targets), wanted.ranks or (1,))


# --------------------------------------------------------------------------------------------------------- measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What reading the adapter, and as much of the base as was wanted, showed; nobody can read numbers of `strange`."""

    sound: Mapping[str, health.Sound]
    strange: tuple[str, ...]
    spectra: Mapping[str, Spectrum]
    alignments: Mapping[str, Alignment]
    reasons: Mapping[str, str]


class Weights:
    """The weights of modules in the base, and why one of them is not compared with."""

    def __init__(self, base: Checkpoint, plan: Plan) -> None:
        self.base, self.places = base, places(plan)

    def align(self, module: Module, core: Core, rank: int) -> Alignment | str:
        """The update beside its weight, or why it is not known."""
        from lora_check.inspection.leading import Weight, align

        assert module.pair
        found = self.places.get(module.parts[module.pair[0]].tensor, [])
        if len(found) != 1:
            return f"its weight lies in {len(found)} tensors of the base"
        if not found[0].holds(module):
            return "the base keeps its weight in other parts, or in another order"
        if why := self._unreadable(found[0], module):
            return why
        return align(core, rank, Weight(self.base, found[0])) or "its weight or its update is zero, or not finite"

    def _unreadable(self, place: Place, module: Module) -> str:
        meta = self.base.metas()[place.tensor]
        if meta.sealed or not meta.dtype.startswith(("float", "bfloat")):
            return f"its weight is stored as {meta.stored_as}"
        out, wide = module.sides
        rows = place.rows[1] - place.rows[0] if place.rows else meta.shape[0]
        held = (rows, meta.numel // max(1, meta.shape[0]))
        return "" if held == ((wide, out) if place.turned else (out, wide)) else f"its weight has the shape {held}"


def _weights(base: Checkpoint | None, plan: Plan, wanted: Wanted) -> Weights | None:
    return Weights(base, plan) if base is not None and wanted.beside else None


def _look(adapter: Adapter, modules: Sequence[Module], weights: Weights | None, progress: Progress | None) -> Looked:
    """Read every tensor of the adapter once, and decompose the update of every module that has a plain one."""
    names = [part.tensor for part in adapter.parts]
    read = {name: health.examined(adapter.checkpoint.read(name)) for name in dict.fromkeys(names)}
    sound = {name: one for name, one in read.items() if one is not None}
    spectra: dict[str, Spectrum] = {}
    alignments: dict[str, Alignment] = {}
    reasons: dict[str, str] = {}
    bar = progress(len(modules), "decomposing", "module") if progress else nullcontext(_silent)
    with bar as advance:
        for module in modules:
            if why := _unfit(module, sound):
                reasons[module.name] = why
            elif (decomposed := _decomposed(adapter, module)) is None:
                reasons[module.name] = "its update is so large that float64 cannot hold its square"
            else:
                spectra[module.name], core = decomposed
                found = weights.align(module, core, spectra[module.name].rank) if weights else None
                if isinstance(found, str):
                    reasons[module.name] = found
                elif found is not None:
                    alignments[module.name] = found
            advance(1)
    strange = tuple(name for name, one in read.items() if one is None)
    return Looked(sound=sound, strange=strange, spectra=spectra, alignments=alignments, reasons=reasons)


def _silent(done: int) -> None:
    del done


def _decomposed(adapter: Adapter, module: Module) -> tuple[Spectrum, Core] | None:
    from lora_check.inspection.cores import decompose

    return decompose(*factors(adapter, module), module.scale.value if module.scale else 1.0)


def _unfit(module: Module, sound: Mapping[str, health.Sound]) -> str:
    if module.why:
        return module.why
    broken = [part.tensor for part in module.parts.values() if sound[part.tensor].nonfinite]
    return f"{broken[0]} is not finite" if broken else ""


def _without_spectrum(modules: Sequence[Module], looked: Looked) -> Iterator[str]:
    """One phrase for each reason for which a module was not measured."""
    groups: dict[str, list[str]] = {}
    for module in modules:
        if module.name in looked.reasons:
            groups.setdefault(looked.reasons[module.name], []).append(module.name)
    for why, names in groups.items():
        rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{names[0]}{rest}: {why}"

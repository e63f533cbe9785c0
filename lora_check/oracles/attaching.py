"""Adapters over a base as PEFT lays them: in turn, weighted, or combined into one.

attached   (base model, folders, weights, combination) -> the PeftModel, its active adapters, what PEFT made up
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_check.adapters.combine import parse_combination
from lora_check.errors import InputError, UsageError
from lora_check.locations import open_checkpoint
from lora_check.oracles.loading import OTHERWISE, few, reading

COMBINED = "combined"
PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """How several adapters act as one: a factor on each one's scale, and a kind of add_weighted_adapter."""

    weights: tuple[float, ...]
    combination: str | None = None

    @property
    def derived(self) -> bool:
        """Whether how much an honest merge may round is derived: not of factors that are made of factors."""
        return self.combination is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """The model, the adapters that act, and what PEFT had to make up."""

    model: Any
    names: tuple[str, ...]
    invented: tuple[str, ...]


def demand_combination(together: Together) -> None:
    """Raise UsageError where no unmerged model can be made: a combination that is unknown, or random."""
    if together.combination is None or len(together.weights) == 1:
        return
    kind, _ = parse_combination(together.combination)
    if kind.refuses:
        raise UsageError(f"there is no unmerged model for --combination {kind.name}", hint=kind.refuses)


def attached(model: Any, folders: Sequence[Path], together: Together) -> Attached:
    """Load the adapters, let them act together, and listen to what PEFT says of it.

    raises   InputError: PEFT refuses the files, or their combination
    """
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found, others = _loaded(model, folders)
    names, lost = [_name(index) for index in range(len(folders))], tuple(_lost(heard))
    with reading("let the adapters act together, beginning with", folders[0]):
        if together.combination is not None:
            _combine(found, names, together)
            names = [COMBINED]
        else:
            _weigh(found, names, together.weights)
        if len(folders) > 1 or names == [COMBINED]:
            found.base_model.set_adapter(names)
    return Attached(model=found.eval(), names=tuple(names), invented=(*lost, *others))


def _loaded(model: Any, folders: Sequence[Path]) -> tuple[Any, list[str]]:
    """The model, and what PEFT keeps silent about: factors that an adapter but the first does not have."""
    import peft

    first, *others = folders
    silent: list[str] = []
    with reading("load the adapter", first):
        model = peft.PeftModel.from_pretrained(model, str(first), adapter_name=_name(0))
    if not hasattr(model, "merge_adapter"):
        method = model.peft_config[_name(0)].peft_type.value
        raise InputError(f"the adapter {first} is of type {method}, which PEFT cannot merge", hint=OTHERWISE)
    for index, folder in enumerate(others, start=1):
        with reading("load the adapter", folder):
            told = model.load_adapter(str(folder), adapter_name=_name(index))
        silent += few(sorted(told.missing_keys), f"the adapter {folder} has no {{}}: PEFT left them as they were drawn")
    return model, silent


def _weigh(model: Any, names: Sequence[str], weights: Sequence[float]) -> None:
    """Multiply each adapter's scale, in every layer that it touches."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, weight in zip(names, weights, strict=True):
        if weight == 1:
            continue
        layers = [one for one in model.modules() if isinstance(one, BaseTunerLayer)]
        scaled = [one.scaling for one in layers if name in (getattr(one, "scaling", None) or {})]
        if not scaled:
            raise InputError(f"a weight of {weight} for {name}: its layers have no scale", hint="leave --weights out")
        for scaling in scaled:
            scaling[name] *= weight


def _combine(model: Any, names: Sequence[str], together: Together) -> None:
    assert together.combination is not None
    kind, options = parse_combination(together.combination)
    model.base_model.add_weighted_adapter(
        list(names),
        list(together.weights),
        COMBINED,
        combination_type=kind.name,
        svd_rank=options.svd_rank or None,
        density=options.density,
        majority_sign_method=options.majority_sign_method,
    )


def brought(model: Any, names: Sequence[str], folders: Sequence[Path], together: Together) -> tuple[str, ...]:
    """Those of the names, of tensors, that lie in modules which an adapter replaces, and that it has a tensor for.

    A combined adapter replaces nothing: PEFT makes its modules anew, of the base's.
    """
    from peft.utils.other import ModulesToSaveWrapper

    if not names or together.combination is not None:
        return ()
    parts = model.get_base_model().named_modules()
    whole = tuple(f"{place}." for place, part in parts if isinstance(part, ModulesToSaveWrapper))
    saved = {name for folder in folders for name in _tensors(folder)}
    return tuple(name for name in names if name.startswith(whole) and f"{PREFIX}{name}" in saved)


def _tensors(folder: Path) -> Mapping[str, Any]:
    with closing(open_checkpoint(str(folder), role="adapter")) as one:
        return one.metas()


def _lost(heard: Sequence[warnings.WarningMessage]) -> Iterator[str]:
    """PEFT says in a warning that it leaves factors at what they were drawn as."""
    for one in heard:
        if "missing adapter keys" in str(one.message):
            yield f"PEFT: {str(one.message).splitlines()[0][:200]}"


def _name(index: int) -> str:
    return f"adapter{index + 1}"

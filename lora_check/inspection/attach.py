"""The parameters of a model with a LoRA adapter attached, named as PEFT's `get_peft_model` names them.

    base_model.model.<module>.base_layer.weight            what was there, frozen
    base_model.model.<module>.lora_A.default.weight        (r, in)
    base_model.model.<module>.lora_B.default.weight        (out, r)
    base_model.model.<module>.modules_to_save.default.*    a copy that is trained whole, beside `original_module.*`

Nothing is loaded: shapes come from a `Model`, all else from the keys of adapter_config.json. What is not predicted is
told, and then the list is not complete.

Source: PEFT tuners/tuners_utils.py check_target_module_exists, tuners/lora/layer.py, utils/other.py _set_trainable
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_check.adapters.scale import scale_in
from lora_check.errors import AdapterConfigError
from lora_check.inspection.model import CONVOLUTION, EMBEDDING, HEAD_NAMES, IN_OUT, LINEAR, Model, Shape, demand_known
from lora_check.promises import is_target
from lora_check.types import AdapterConfig

PREFIX, NAME = "base_model.model.", "default"
ALL_LINEAR = "all-linear"
UNPREDICTED = {
    "alora_invocation_tokens": "an activated LoRA",
    "arrow_config": "an Arrow router",
    "kasa_config": "KaSA",
    "layer_replication": "layer_replication",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "target_parameters",
    "use_bdlora": "BD-LoRA",
    "velora_config": "VeLoRA",
}
"""Keys under which PEFT names parameters in ways that are not predicted here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of the model with its adapter; `trained`: of the adapter, whole or in part."""

    name: str
    shape: Shape
    trained: bool

    @property
    def saved(self) -> str:
        """The name under which `save_pretrained` writes a trained one."""
        plain = self.name.replace(f".modules_to_save.{NAME}.", ".")
        return re.sub(rf"\.{NAME}(?=\.|$)", "", plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """All parameters, in the order of the model's; `reasons` say why that could not be told."""

    parameters: tuple[Parameter, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def trained(self) -> tuple[Parameter, ...]:
        """Those that belong to the adapter."""
        return tuple(one for one in self.parameters if one.trained)


def attach(model: Model, config: AdapterConfig) -> Attached:
    """The parameters of the model with this adapter.

    raises   InputError: a target is no layer that LoRA can be laid over, as far as is known
    """
    reasons = tuple(_unpredicted(config))
    if reasons:
        return Attached(reasons=reasons)
    targets = set(targeted(model, config))
    if not targets:
        return Attached(reasons=("no module of the base is a target of the configuration",))
    return Attached(parameters=tuple(_Attacher(model, config, targets).all()))


def targeted(model: Model, config: AdapterConfig) -> list[str]:
    """The modules that PEFT would lay LoRA over.

    raises   InputError: a key that chooses modules holds what PEFT could not read either
    """
    _demand_readable(config.raw)
    return [module for module in model.modules() if module and _is_targeted(module, model, config.raw)]


def factors_of(kind: str, weight: Shape, rank: int) -> dict[str, Shape]:
    """End of the name -> shape of the two factors over a weight.

    linear (out, in), in-out (in, out): A (r, in), B (out, r)     embedding (rows, dim): A (r, rows), B (dim, r)
    convolution (out, in, k...): A (r, in, k...), B (out, r, 1...)
    """
    if kind == EMBEDDING:
        return {"lora_embedding_A": (rank, weight[0]), "lora_embedding_B": (weight[1], rank)}
    if kind == CONVOLUTION:
        return {"lora_A": (rank, *weight[1:]), "lora_B": (weight[0], rank, *(1 for _ in weight[2:]))}
    wide, out = weight if kind == IN_OUT else weight[::-1]
    return {"lora_A": (rank, wide), "lora_B": (out, rank)}


class _Attacher:
    """One configuration, laid over one model."""

    def __init__(self, model: Model, config: AdapterConfig, targets: set[str]) -> None:
        self.model, self.config, self.targets = model, config, targets
        self.modules = model.modules()
        self.saved = [one for one in _every_module(self.modules) if one.endswith(tuple(config.saved) or ("\0",))]
        self.rows = {module: len(rows) for module, rows in self._token_rows()}

    def all(self) -> Iterator[Parameter]:
        """What every module has, and what its wrappers add."""
        wrapped = {module: home for module in self.modules if (home := self._saver(module))}
        for module, leaves in self.modules.items():
            if module not in wrapped:
                yield from self._module(module, leaves)
        for home in dict.fromkeys(wrapped.values()):
            inside = [one for one, its in wrapped.items() if its == home]
            yield from self._copies(home, inside)

    def _module(self, module: str, leaves: Sequence[str]) -> Iterator[Parameter]:
        tokens = ".token_adapter" if module in self.rows else ""
        wrapper = f"{tokens}.base_layer" if tokens or module in self.targets else ""
        for leaf in leaves:
            name = f"{module}{wrapper}.{leaf}".lstrip(".")
            yield _parameter(name, self._own(module, leaf), self._trains_bias(module, leaf))
        if module in self.targets:
            yield from self._factors(module)
        if tokens:
            weight = self.model.weight(module)
            assert weight is not None, module
            shape = (self.rows[module], weight[1])
            yield _parameter(f"{module}.token_adapter.trainable_tokens_delta.{NAME}", shape, True)

    def _factors(self, module: str) -> Iterator[Parameter]:
        kind, weight = demand_known(self.model, module), self.model.weight(module)
        assert weight is not None, module
        shapes = factors_of(kind, weight, scale_in(self.config, module).rank)
        leaf = "" if kind == EMBEDDING else ".weight"
        for end, shape in shapes.items():
            yield _parameter(f"{module}.{end}.{NAME}{leaf}", shape, True)
        out = list(shapes.values())[1][0]
        if self.config.lora_bias and kind != EMBEDDING:
            yield _parameter(f"{module}.lora_B.{NAME}.bias", (out,), True)
        if self.config.dora:
            magnitude = (1, out, *(1 for _ in weight[2:])) if kind == CONVOLUTION else (out,)
            yield _parameter(f"{module}.lora_magnitude_vector.{NAME}.weight", magnitude, True)

    def _copies(self, home: str, inside: Sequence[str]) -> Iterator[Parameter]:
        """A module that is saved whole: the original, then the copy that is trained; a tied one gets its own."""
        own = [(f"{one}.{leaf}"[len(home) + 1 :], self._own(one, leaf)) for one in inside for leaf in self.modules[one]]
        shared = [
            (name[len(home) + 1 :], self.model.parameters[source])
            for name, source in self.model.aliases.items()
            if name.startswith(f"{home}.")
        ]
        for rest, shape in own:
            yield _parameter(f"{home}.original_module.{rest}", shape, False)
        for rest, shape in (*own, *shared):
            yield _parameter(f"{home}.modules_to_save.{NAME}.{rest}", shape, True)

    def _saver(self, module: str) -> str:
        """The module of modules_to_save that this one is, or lies in."""
        return next((one for one in self.saved if f"{module}.".startswith(f"{one}.")), "")

    def _own(self, module: str, leaf: str) -> Shape:
        return self.model.parameters[f"{module}.{leaf}".lstrip(".")]

    def _trains_bias(self, module: str, leaf: str) -> bool:
        if self.config.biases == "all":
            return "bias" in leaf or "bias" in module
        return self.config.biases == "lora_only" and leaf == "bias" and module in self.targets

    def _token_rows(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Embeddings of which single rows are trained; a head that is tied to one shares its rows."""
        for key, rows in self.config.token_rows.items():
            for module in self.modules:
                named = module.endswith(key) if key else self.model.kinds.get(module) == EMBEDDING
                if named and f"{module}.weight" in self.model.parameters and (key or self._has_tokens(module)):
                    yield module, rows

    def _has_tokens(self, module: str) -> bool:
        return f"{module}.weight" in self.model.vocabulary


def _parameter(name: str, shape: Shape, trained: bool) -> Parameter:
    return Parameter(name=f"{PREFIX}{name}", shape=tuple(shape), trained=trained)


def _every_module(modules: Mapping[str, Any]) -> list[str]:
    """Modules with parameters, and the modules that they lie in."""
    found: dict[str, None] = {}
    for module in modules:
        segments = module.split(".")
        found.update(dict.fromkeys(".".join(segments[:end]) for end in range(1, len(segments) + 1)))
    return list(found)


# --------------------------------------------------------------------------------------------------------- targets


def _unpredicted(config: AdapterConfig) -> Iterator[str]:
    if config.method != "LORA":
        yield f"the names that PEFT gives the parameters of {config.method} are not predicted"
    for key, what in UNPREDICTED.items():
        if config.raw.get(key):
            yield f"the names that PEFT gives the parameters of {what} are not predicted"
    if config.raw.get("target_modules") is None and not config.raw.get("target_parameters"):
        yield "the configuration names no target_modules, and PEFT's defaults are not known here"


def _demand_readable(raw: Mapping[str, Any]) -> None:
    """Raise AdapterConfigError where a key that chooses modules holds neither names nor a pattern."""
    for key in ("exclude_modules", "layers_pattern", "modules_to_save"):
        value = raw.get(key) or []
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(one, str) for one in names):
            raise _impossible(key, value, "no list of names")
        for one in names if key != "exclude_modules" or isinstance(value, str) else ():
            _demand_pattern(key, one)
    layers = raw.get("layers_to_transform") or []
    if type(layers) is not int and not (isinstance(layers, list) and all(type(one) is int for one in layers)):
        raise _impossible("layers_to_transform", layers, "no whole number and no list of them")


def _demand_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise _impossible(key, pattern, f"no regular expression ({error})") from error


def _impossible(key: str, value: Any, what: str) -> AdapterConfigError:
    hint = "mend the configuration, or save the adapter again with save_pretrained"
    return AdapterConfigError(f"adapter_config.json has {key} = {value!r}, {what}", hint=hint)


def _is_targeted(module: str, model: Model, raw: Mapping[str, Any]) -> bool:
    """Whether PEFT would adapt a module: named, not excluded, of the layers that are transformed, not saved whole."""
    excluded = raw.get("exclude_modules")
    if excluded and is_target(module, excluded if isinstance(excluded, str) else tuple(excluded)):
        return False
    if any(re.match(rf"(^|.*\.){one}($|\..*)", module) for one in raw.get("modules_to_save") or ()):
        return False
    targets = raw.get("target_modules") or ()
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return _is_inner_linear(module, model)
    if isinstance(targets, str):
        return is_target(module, targets)
    return is_target(module, tuple(targets)) and _is_transformed(module, raw)


def _is_inner_linear(module: str, model: Model) -> bool:
    """A linear layer that is not the output head."""
    weight = f"{module}.weight"
    head = model.aliases.get(weight, weight) in model.vocabulary or module.rsplit(".", 1)[-1] in HEAD_NAMES
    return model.kinds.get(module) in (LINEAR, IN_OUT) and not head


def _is_transformed(module: str, raw: Mapping[str, Any]) -> bool:
    """Whether layers_to_transform, if it is set, has the layer of this module."""
    layers = raw.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = raw.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    before = r".*?\." if not raw.get("layers_pattern") else r"(?:^|.*?\.)"
    found = next(
        (one for pattern in patterns if (one := re.match(rf"{before}{pattern}\.(?P<idx>\d+)\.", module))), None
    )
    return found is not None and int(found["idx"]) in ([layers] if isinstance(layers, int) else layers)

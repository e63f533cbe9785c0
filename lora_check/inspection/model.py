"""The parameters of a base model, from whatever tells them: headers, a table of shapes, or the class of a config.json.

Only the class knows what a module is. Where there are names and shapes alone, a matrix under the name of an embedding
is one, a matrix of a GPT-2-like model is kept as (in, out), and of tensors with more axes nothing is predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from lora_check import registry
from lora_check.errors import CorruptCheckpointError, InputError, NotFoundError, UsageError, WrongInputError
from lora_check.formats import _folder
from lora_check.layouts.tied_head import HEADS
from lora_check.links import lookup
from lora_check.orientation import IN_OUT_MODELS
from lora_check.types import Checkpoint, TensorMeta

SHIPPED = Path(__file__).parents[1] / "data" / "shapes"
EMBEDDINGS = ("embed_in", "embed_tokens", "shared", "tok_embeddings", "word_embeddings", "wpe", "wte")
HEAD_NAMES = tuple(head.rsplit(".", 1)[-1] for head in HEADS)
HEAD, WITH_HEAD = "lm_head.weight", ("ForCausalLM", "LMHeadModel")
"""The output head of a causal model, and how the classes end that have one of this name."""

LINEAR, IN_OUT, EMBEDDING, CONVOLUTION, OTHER = "linear", "in-out", "embedding", "convolution", "other"
"""What LoRA can be laid over; `OTHER` is all else."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The parameters of a model and what its modules are.

    told_by     "headers", "table" or "class"
    parameters  name -> shape, each tensor once
    kinds       module -> what it is
    aliases     a further name of a parameter -> the name under which it is in `parameters`
    vocabulary  the parameters with a row for each token
    """

    location: str
    told_by: str
    parameters: Mapping[str, Shape]
    kinds: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    vocabulary: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many numbers the model has."""
        return sum(prod(shape) for shape in self.parameters.values())

    def weight(self, module: str) -> Shape | None:
        """The shape of a module's weight, its own or one that it shares."""
        name = f"{module}.weight"
        return self.parameters.get(self.aliases.get(name, name))

    def modules(self) -> dict[str, list[str]]:
        """Module -> the ends of its parameters' names, each tensor where it is met first."""
        found: dict[str, list[str]] = {}
        for name in self.parameters:
            module, _, leaf = name.rpartition(".")
            found.setdefault(module, []).append(leaf)
        for name in self.aliases:
            found.setdefault(name.rpartition(".")[0], [])
        return found

    def grown(self, tokens: int) -> Model:
        """The same with rows for more tokens.

        raises   UsageError: it is not told which of its tensors have a row for each token
        """
        if not tokens:
            return self
        if not self.vocabulary:
            raise UsageError(
                f"which tensors of {self.location} have a row for each token is not known",
                hint="leave --extra-tokens out, or give a folder with its config.json",
            )
        rows = {name: (shape[0] + tokens, *shape[1:]) for name, shape in self.parameters.items()}
        return replace(self, parameters={**self.parameters, **{name: rows[name] for name in self.vocabulary}})


def of_headers(checkpoint: Checkpoint) -> Model:
    """A model as its files tell it; buffers are left out, and heads that the configuration ties share a name."""
    metas, config = checkpoint.metas(), checkpoint.config
    kept = {name: meta.shape for name, meta in metas.items() if not _is_buffer(meta)}
    return _named(checkpoint.location, "headers", kept, config, _tied(metas, config))


def of_table(name: str) -> Model:
    """A model as a JSON file has it, {name: shape}; `__metadata__` may say where it comes from.

    name     a file, or the name of a table that comes with the package
    raises   NotFoundError, CorruptCheckpointError: no such table, or a shape that is none
    """
    shipped = SHIPPED / f"{name}.json"
    place = shipped if not Path(name).exists() and "/" not in name and shipped.is_file() else Path(name)
    if not place.is_file():
        known = ", ".join(sorted(one.stem for one in SHIPPED.glob("*.json")))
        raise NotFoundError(f"no table of shapes lies at {name!r}", hint=f"name a JSON file, or one of: {known}")
    raw = _folder.read_object(place)
    told = raw.pop("__metadata__", {})
    config = told.get("config", {}) if isinstance(told, dict) else {}
    shapes = {one: _shape(one, value, place) for one, value in raw.items()}
    if not shapes:
        raise CorruptCheckpointError(f"{place} names no tensor", hint='write {"name": [rows, columns], ...}')
    return _named(str(name), "table", shapes, config if isinstance(config, dict) else {}, {})


def of_class(config: Mapping[str, Any], location: str) -> Model:
    """A model as the class of its config.json makes it, without data; code that lies beside a model is never run."""
    from lora_check.oracles.model_class import made

    return Model(location=location, told_by="class", config=config, **made(config, location))


def of_folder(place: Path, opened: Checkpoint | None) -> Model:
    """A model from its headers, or, where no weights are there, from its config.json."""
    if opened is not None:
        return of_headers(opened)
    config = _folder.read_config(place)
    if not config:
        raise WrongInputError(f"{place} has neither weights nor a config.json", hint="name the folder of a model")
    return of_class(config, str(place))


# ------------------------------------------------------------------------------------------------ names and shapes


def _named(
    location: str, told_by: str, shapes: Mapping[str, Shape], config: Mapping[str, Any], aliases: Mapping[str, str]
) -> Model:
    weights = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    heads = {name.removesuffix(".weight"): shapes[source] for name, source in aliases.items()}
    kinds = {module: _kind(module, shape, config) for module, shape in {**weights, **heads}.items()}
    return Model(
        location=location,
        told_by=told_by,
        parameters=shapes,
        kinds=kinds,
        aliases=aliases,
        vocabulary=tuple(_vocabulary(shapes, config)),
        config=config,
    )


def _kind(module: str, shape: Shape, config: Mapping[str, Any]) -> str:
    last = module.rsplit(".", 1)[-1]
    if len(shape) != 2:
        return OTHER
    if last in EMBEDDINGS or "embeddings" in last:
        return EMBEDDING
    return IN_OUT if config.get("model_type") in IN_OUT_MODELS and last not in HEAD_NAMES else LINEAR


def _vocabulary(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Iterator[str]:
    """Embeddings and heads with as many rows as the configuration, or the one embedding, has tokens."""
    rows = {name: shape[0] for name, shape in shapes.items() if shape and name.endswith(("weight", "bias"))}
    plain = [name for name in rows if name.removesuffix(".weight").rsplit(".", 1)[-1] in EMBEDDINGS]
    told = config.get("vocab_size") or (rows[plain[0]] if len(plain) == 1 else 0)
    for name, count in rows.items():
        last = name.rpartition(".")[0].rsplit(".", 1)[-1]
        if count == told and last in (*EMBEDDINGS, *HEAD_NAMES, "predictions"):
            yield name


def _is_buffer(meta: TensorMeta) -> bool:
    """What a model keeps beside its parameters: whole numbers, running statistics, what it rebuilds."""
    statistics = meta.name.endswith((".running_mean", ".running_var"))
    rebuilt = registry.load("layouts")["rebuilt"].drops(meta, {})
    whole = not meta.codes and not meta.dtype.startswith(("float", "bfloat"))
    return statistics or rebuilt or whole


def _tied(metas: Mapping[str, TensorMeta], config: Mapping[str, Any]) -> dict[str, str]:
    """The head of a causal model whose file lacks it: it is the embedding."""
    classes = [str(one) for one in config.get("architectures") or ()]
    source = lookup(HEAD, metas, config) if any(one.endswith(WITH_HEAD) for one in classes) else None
    return {HEAD: source} if source and source != HEAD else {}


def _shape(name: str, value: Any, place: Path) -> Shape:
    whole = isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)
    if not whole:
        raise CorruptCheckpointError(
            f"{place} has {value!r} for {name!r}, not a shape", hint='write {"name": [rows, columns], ...}'
        )
    return tuple(value)


def demand_known(model: Model, module: str) -> str:
    """What a module is; raises InputError where LoRA cannot be laid over it as far as is known."""
    kind = model.kinds.get(module, OTHER)
    if kind == OTHER:
        known = model.told_by == "class"
        why = "" if known else f", as far as its {model.told_by} can tell"
        more = "" if known else "; of a folder with a config.json and no weights the class is asked, which knows more"
        raise InputError(
            f"{module} is no linear layer, embedding or ungrouped convolution{why}", hint=f"narrow the targets{more}"
        )
    return kind

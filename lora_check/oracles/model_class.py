"""The parameters of a model as transformers' class makes them from a config.json: on the meta device, without data.

made     (config.json, where it lies) -> names, shapes and kinds of modules
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_check.errors import InputError, UsageError
from lora_check.oracles.manners import first_sentence, quiet

NEVER_RUN = "code that lies beside a model is never run; give the shapes of its tensors with --shapes FILE"


def made(config: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Parameters, kinds, aliases and vocabulary, as `Model` has them.

    raises   UsageError: transformers is missing; InputError: it does not know the model, or refuses the configuration
    """
    model = _model(config, location)
    names: dict[int, str] = {id(value): name for name, value in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    aliases = {name: names[id(value)] for name, value in every if names[id(value)] != name}
    return {
        "parameters": {name: tuple(value.shape) for name, value in model.named_parameters()},
        "kinds": {name: _kind(module) for name, module in model.named_modules(remove_duplicate=False)},
        "aliases": aliases,
        "vocabulary": tuple(dict.fromkeys(names[id(one)] for one in _rows_of_tokens(model))),
    }


def _model(config: Mapping[str, Any], location: str) -> Any:
    transformers, torch = _libraries()
    kind, name = str(config.get("model_type") or ""), _class_name(config, location)
    if not kind:
        raise InputError(f"config.json of {location} tells no model_type", hint=NEVER_RUN)
    if kind not in transformers.CONFIG_MAPPING:
        raise InputError(f"config.json of {location} says {kind!r}, which transformers does not know", hint=NEVER_RUN)
    known: Any = getattr(transformers, name, None) if name else transformers.AutoModel
    if name and not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
        raise InputError(f"transformers has no model {name}, which config.json of {location} names", hint=NEVER_RUN)
    try:
        with quiet(), torch.device("meta"):
            parsed = transformers.CONFIG_MAPPING[kind].from_dict(dict(config))
            return known.from_config(parsed) if known is transformers.AutoModel else known(parsed)
    except Exception as error:
        told = first_sentence(str(error)) or type(error).__name__
        raise InputError(
            f"transformers could not make a {kind} model of config.json of {location}: {told}", hint="mend config.json"
        ) from error


def _class_name(config: Mapping[str, Any], location: str) -> str:
    """The first of the architectures, or the one where there is no list; empty where none is named."""
    named = config.get("architectures") or ""
    first = named[0] if isinstance(named, list) else named
    if not isinstance(first, str):
        raise InputError(f"config.json of {location} names {named!r} as architectures", hint='give a list: ["..."]')
    return first


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UsageError(
            "to make shapes from a config.json alone transformers is needed", hint="pip install lora_check[parity]"
        ) from error
    return transformers, torch


def _kind(module: Any) -> str:
    """What PEFT would lay LoRA over it as."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return "linear" if not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) else "other"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolution" if module.groups == 1 else "other"
    return "in-out" if type(module).__name__ == "Conv1D" else "other"


def _rows_of_tokens(model: Any) -> list[Any]:
    """Weights and biases of the input embedding and of the output head; a model of images has neither."""
    try:
        modules = (model.get_input_embeddings(), model.get_output_embeddings())
    except NotImplementedError:
        return []
    found = [getattr(module, leaf, None) for module in modules for leaf in ("weight", "bias")]
    return [one for one in found if one is not None]

"""The parameters of a model as transformers' class makes them from a config.json: on the meta device, without data.

made     (config.json, where it lies) -> names, shapes and kinds of modules
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lora_check.errors import InputError, UsageError

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
    kind, classes = str(config.get("model_type") or ""), config.get("architectures") or [""]
    if kind not in transformers.CONFIG_MAPPING:
        said = f"{kind!r}, which" if kind else "no model_type that"
        raise InputError(f"config.json of {location} says {said} transformers does not know", hint=NEVER_RUN)
    known = getattr(transformers, str(classes[0]), None) if classes[0] else transformers.AutoModel
    if known is None:
        raise InputError(f"transformers has no class {classes[0]}, which {location} names", hint=NEVER_RUN)
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # of a model that is never used
            parsed = transformers.CONFIG_MAPPING[kind].from_dict(dict(config))
            return known.from_config(parsed) if known is transformers.AutoModel else known(parsed)
    except Exception as error:
        lines = str(error).strip().splitlines()
        told = lines[0] if lines else type(error).__name__
        raise InputError(
            f"transformers could not make a {kind} model of config.json of {location}: {told}", hint="mend config.json"
        ) from error


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

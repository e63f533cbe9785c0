"""An opened checkpoint and the adapter_config.json beside it -> Adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lora_check import registry
from lora_check.errors import AdapterConfigError, UsageError, WrongInputError
from lora_check.locations import find_adapter_config, read_adapter_config
from lora_check.types import Adapter, Checkpoint, Dialect

GENERAL = "peft"
"""The dialect that is asked last: its configuration is also written beside tensors that another tool named."""

NO_ADAPTERS: Mapping[str, str] = {
    "an optimizer's state": r"(.+[./])?((max_)?exp_avg(_sq)?|momentum_buffer)([./].+)?|optimizer[./].+|param_groups.*",
    "a trained prompt": r"(.+\.)?(prompt_embeddings|prefix_tokens|soft_prompt)(\..+)?|prompt_encoder\..+",
    "a textual inversion": r"emb_params|string_to_param.*|clip_[lg]|<[^<>]+>",
    "a full checkpoint": r"(?!.*(lora|lokr|hada|oft|adapter)).+\.(weight|bias|scale|in_proj_weight|in_proj_bias)",
}
"""What a file may be that is no adapter -> the names of its tensors."""


def read_adapter(checkpoint: Checkpoint, weight: float = 1.0) -> Adapter:
    """Parse an opened adapter with the first dialect that recognises it.

    weight   a factor on its scale
    raises   AdapterConfigError: no configuration, an impossible one, or names of no known dialect
             WrongInputError: the file is no adapter
    """
    raw, names = find_adapter_config(checkpoint), tuple(checkpoint.metas())
    dialects: Iterable[Dialect] = registry.load("dialects").values()
    for dialect in sorted(dialects, key=lambda one: one.name == GENERAL):
        if dialect.recognises(raw or {}, names):
            told = read_adapter_config(checkpoint) if dialect.needs_config else raw or {}
            return replace(dialect.read(told, checkpoint), weight=weight)
    if raw is None and any(name.startswith("base_model.") for name in names):
        read_adapter_config(checkpoint)
    raise _unknown(checkpoint, names)


def bind(adapter: Adapter, base: Checkpoint) -> Adapter:
    """The adapter with its modules named as in BASE, where its tool names them otherwise; headers only.

    raises   UsageError: a combination of adapters that PEFT, whose combinations are known here, cannot read
    """
    foreign = [one for one in adapter.members if one.dialect != GENERAL]
    if foreign:
        raise UsageError(
            f"PEFT cannot combine {foreign[0].location}: it is written as {foreign[0].dialect} writes adapters",
            hint="leave --combination out to merge the adapters one after the other",
        )
    dialect = registry.load("dialects").get(adapter.dialect)
    bound: Adapter = dialect.bind(adapter, base) if dialect and dialect.bind else adapter
    return replace(bound, refused={**_no_numbers(bound), **bound.refused})


def _no_numbers(adapter: Adapter) -> dict[str, str]:
    """Module -> which of its factors, or of the weights that they are added to, is stored as integers."""
    metas = adapter.checkpoint.metas()
    if adapter.config.method != "LORA" and adapter.dialect == GENERAL:
        return {}
    adapted = {part.module for part in adapter.parts if part.role != "S"}
    return {
        part.module: f"{part.tensor} is stored as {dtype}"
        for part in adapter.parts
        if part.role != "S" or part.module.rpartition(".")[0] in adapted
        if (dtype := metas[part.tensor].dtype).startswith(("int", "uint", "bool"))
    }


def _unknown(checkpoint: Checkpoint, names: tuple[str, ...]) -> AdapterConfigError | WrongInputError:
    """Why a file is not read: what it looks like, or that nobody here knows such names."""
    for what, pattern in NO_ADAPTERS.items():
        fitting = [name for name in names if re.fullmatch(pattern, name)]
        if 2 * len(fitting) > len(names):
            message = f"adapter: {checkpoint.location} is no adapter but looks like {what}: it holds {fitting[0]!r}"
            return WrongInputError(message, hint="the order is BASE ADAPTER MERGED")
    known, held = ", ".join(registry.load("dialects")), repr(names[0]) if names else "nothing"
    return AdapterConfigError(
        f"adapter: the tensor names of {checkpoint.location} are of no known adapter dialect: it holds {held}",
        hint=f"known dialects: {known}",
    )

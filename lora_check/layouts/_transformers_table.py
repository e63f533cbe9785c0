"""transformers' own table of renamed, stacked and cut tensors, for one configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple


class Table(NamedTuple):
    """What transformers does to the names of one architecture, and the parameters it then has.

    parameters   name -> shape, of a model of the configuration
    prefix       the attribute of the headless model in the model with a head
    """

    renamings: tuple[Any, ...]
    converters: tuple[Any, ...]
    prefix: str
    parameters: Mapping[str, tuple[int, ...]]


class Loaded(NamedTuple):
    """The name a tensor is loaded under, and the conversion with the pattern that caught it, if there is one."""

    memory: str
    converter: Any
    pattern: str


def table_of(config: Mapping[str, Any]) -> Table | None:
    """The table for a config.json; None without transformers 5, or for a model that it does not know."""
    classes = config.get("architectures")
    if not config.get("model_type") or not isinstance(classes, (list, tuple)) or not classes:
        return None
    return _table(str(classes[0]), json.dumps(dict(config), sort_keys=True, default=str))


@lru_cache(maxsize=4)
def _table(name: str, config: str) -> Table | None:
    """A model of that class is made without data; custom code is never run: only transformers' classes are asked."""
    try:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        from lora_check.oracles.manners import quiet

        raw = json.loads(config)
        known = getattr(transformers, name)
        if not issubclass(known, transformers.PreTrainedModel):
            return None
        with quiet(), torch.device("meta"):
            model = known(transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw))
            steps = get_model_conversion_mapping(model)
        parameters = {one: tuple(value.shape) for one, value in model.state_dict().items()}
    except Exception:  # noqa: BLE001  whatever an architecture's constructor raises: its names are then not known
        return None
    return Table(
        renamings=tuple(one for one in steps if not isinstance(one, WeightConverter)),
        converters=tuple(one for one in steps if isinstance(one, WeightConverter)),
        prefix=str(model.base_model_prefix),
        parameters=parameters,
    )


def loaded(name: str, table: Table) -> Loaded:
    """The name that a tensor of a file is loaded under; a parameter that no rule leads to another one keeps its own."""
    renamed = name
    for renaming in table.renamings:
        renamed, _ = renaming.rename_source_key(renamed)
    for converter in table.converters:
        converted, pattern = converter.rename_source_key(renamed)
        if pattern is not None:
            return Loaded(_with_prefix(converted, table), converter, pattern)
    found = _with_prefix(renamed, table)
    return Loaded(found if found in table.parameters or name not in table.parameters else name, None, "")


def _with_prefix(name: str, table: Table) -> str:
    """The name with the attribute of the headless model before it or without it, where that makes it a parameter."""
    candidates = (name, f"{table.prefix}.{name}", name.removeprefix(f"{table.prefix}."))
    return next((one for one in candidates if one in table.parameters), name)

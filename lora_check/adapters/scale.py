"""What the configuration says of one module: alpha and r after the patterns, and the rows that were trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lora_check.types import Adapter, AdapterConfig, Scale


def scale_of(adapter: Adapter, module: str) -> Scale:
    """The scale of one module, with the adapter's weight: what its tensors tell, else what the configuration says."""
    told = adapter.scales.get(module)
    return replace(told or scale_in(adapter.config, module), weight=adapter.weight)


def scale_in(config: AdapterConfig, module: str) -> Scale:
    """s = alpha / r, or alpha / sqrt(r) under rsLoRA, of one module.

    Source: PEFT tuners/lora/model.py LoraModel._create_and_replace, tuners/lora/layer.py LoraLayer.update_layer.
    """
    alphas = [float(value) for value in _matches(config.alpha_pattern, module)] or [float(config.alpha)]
    return Scale(
        alpha=alphas[0],
        rank=int(next(_matches(config.rank_pattern, module), config.rank)),
        rule="alpha/sqrt(r)" if config.rslora else "alpha/r",
        default_alpha=float(config.alpha),
        default_rank=config.rank,
        other_alphas=tuple(dict.fromkeys(one for one in alphas if one != alphas[0])),
    )


def tokens_of(adapter: Adapter, module: str) -> tuple[int, ...]:
    """The rows of an embedding that `trainable_token_indices` lists: under its name, or as a plain list."""
    rows = adapter.config.token_rows
    named = [indices for key, indices in rows.items() if key and (module == key or module.endswith(f".{key}"))]
    return named[0] if named else rows.get("", ())


def _matches(patterns: Mapping[str, Any], module: str) -> Iterator[Any]:
    """The values of the keys that match the module or a dotted end of it; PEFT's get_pattern_key takes the first.

    The first in the file is what a reload takes. The session that trained the adapter may have taken another one, for
    PEFT writes the keys sorted.
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            yield value

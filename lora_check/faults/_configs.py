"""What config.json says of a model, its text part included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT = ("text_config", "language_config", "llm_config", "thinker_config")
"""Where a model of several parts keeps the configuration of the one that reads text."""


def said(config: Mapping[str, Any], *keys: str) -> Any:
    """The first of these keys that is set, in the configuration itself or in that of its text part."""
    parts = (config, *(config[name] for name in TEXT if isinstance(config.get(name), Mapping)))
    return next((part[key] for part in parts for key in keys if part.get(key) is not None), None)


def model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """The model_type of the model and of its text part."""
    parts = (config, *(config[name] for name in TEXT if isinstance(config.get(name), Mapping)))
    return frozenset(str(part["model_type"]) for part in parts if part.get("model_type"))


def quantisation(config: Mapping[str, Any]) -> str:
    """The method of a quantization_config, or of mlx's `quantization`; empty where there is none."""
    for key in ("quantization_config", "compression_config", "quantization"):
        found = config.get(key)
        if isinstance(found, Mapping) and found:
            return str(found.get("quant_method") or ("mlx" if "group_size" in found else "an unnamed method"))
    return ""

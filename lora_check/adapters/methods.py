"""The PEFT types whose adapters are recomputed, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from lora_check import registry
from lora_check.errors import RegistryError
from lora_check.types import Method

ANY_METHOD = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    }
)
"""Keys of every tuner's configuration that are read for all alike, or that change no merged number."""

_PROMPTS = "it trains a prompt, no weight of the base changes, and there is nothing to merge"
_AT_RUN_TIME = "it mixes or gates adapters while the model runs, which no merged weight can do"
UNMERGEABLE = {
    "ADAPTION_PROMPT": _PROMPTS,
    "CARTRIDGE": _PROMPTS,
    "CPT": _PROMPTS,
    "LILY": "its layers share factors through a router, and PEFT has no merge for it",
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "POLY": _AT_RUN_TIME,
    "PREFIX_TUNING": _PROMPTS,
    "PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "SHADOW": "it runs a second network beside the base, and PEFT refuses to merge it",
    "XLORA": _AT_RUN_TIME,
}
"""PEFT types that no release can merge: the reason that LC301 tells."""


@cache
def methods() -> Mapping[str, Method]:
    """The methods that the recipes belong to, by peft_type.

    raises   RegistryError: two recipes with different methods of one name
    """
    found: dict[str, Method] = {}
    for name, recipe in registry.load("recipes").items():
        if recipe.method and found.setdefault(recipe.method.name, recipe.method) is not recipe.method:
            raise RegistryError(
                f"recipe {name!r} has a Method {recipe.method.name} of its own", hint="share one in a private file"
            )
    return found


def why_not(raw: Mapping[str, Any], name: str) -> list[str]:
    """The reasons for which an adapter of a type other than LoRA cannot be recomputed; none, if it can."""
    if name in UNMERGEABLE:
        return [f"adapters of type {name} cannot be merged: {UNMERGEABLE[name]}"]
    method = methods().get(name)
    if method is None:
        return [f"adapters of type {name} are not recomputed by this version"]
    refusal = method.refuses(raw) if method.refuses else ""
    known = ANY_METHOD | method.keys | {method.alpha, method.rank, "alpha_pattern", "rank_pattern"}
    unknown = [key for key, value in raw.items() if value and key not in known]
    told = [f"the configuration key {key!r} is not known to this version" for key in sorted(unknown)]
    return [refusal, *told] if refusal else told

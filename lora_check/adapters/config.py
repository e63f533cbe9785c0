"""adapter_config.json of any age and any subset of keys -> AdapterConfig, parsed once.

What is not understood is not ignored: it becomes a reason in `AdapterConfig.unsupported`; what cannot be is refused.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_check.adapters.methods import methods, why_not
from lora_check.errors import AdapterConfigError
from lora_check.types import AdapterConfig

WITHOUT_EFFECT = frozenset(
    {
        "alpha_pattern",
        "arrow_expert_num",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "enable_lora",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "kasa_config",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "merge_weights",
        "modules_to_save",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_rslora",
        "velora_config",
    }
)
"""Keys of LoraConfig that are read here, or that do not change what the stored factors mean."""

UNSUPPORTED = {
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only and cannot be merged",
    "arrow_config": "an Arrow router mixes adapters at run time and cannot be merged",
    "corda_config": "CorDA belongs to a base that was decomposed when the adapter was made",
    "layer_replication": "layer_replication makes several layers share one weight",
    "use_qalora": "QA-LoRA needs a quantised base and cannot be merged",
}
"""Keys whose formula is not recomputed here: the reason that LC301 tells."""

PLAIN_STARTS = ("eva", "gaussian", "lora_ga", "mica", "olora", "orthogonal", "pissa", "true", "false")
"""Values of init_lora_weights under which the base that PEFT merges into is known; for pissa and olora, recomputed."""

UNKNOWN_BASES = {
    "corda": "PEFT decomposes the base by a covariance that the adapter lacks, and loads no such adapter",
    "loftq": "PEFT quantises the base anew when it loads this adapter, and adds to what is left",
    "pissa_niter_": "PEFT decomposes the base anew by an unseeded random projection when it loads this adapter",
}
"""Beginnings of init_lora_weights under which no file tells what the base becomes, and why."""


def parse_config(raw: Mapping[str, Any], where: str) -> AdapterConfig:
    """adapter_config.json, whatever subset of keys it has, with PEFT's own defaults for the others."""
    method = str(raw.get("peft_type") or "LORA").upper()
    alpha, rank = _ingredients(method)
    return AdapterConfig(
        method=method,
        rank=_rank(rank, raw.get(rank) if raw.get(rank) is not None else 8, where) if rank else 0,
        alpha=_number(alpha, raw.get(alpha) if raw.get(alpha) is not None else 8, where) if alpha else 0,
        rslora=bool(raw.get("use_rslora")),
        dora=bool(raw.get("use_dora")),
        in_out=raw.get("fan_in_fan_out"),
        rank_pattern=_pattern(raw, "rank_pattern", _rank, where) if rank and _has_patterns(method) else {},
        alpha_pattern=_pattern(raw, "alpha_pattern", _number, where) if _has_patterns(method) else {},
        token_rows=_token_rows(raw, method, where),
        targets=_targets(raw, where),
        saved=_names(raw, "modules_to_save", where),
        biases=str(raw.get("bias") or "none"),
        lora_bias=bool(raw.get("lora_bias")),
        base_name=str(raw.get("base_model_name_or_path") or ""),
        producer=f"peft {raw['peft_version']}" if raw.get("peft_version") else "",
        unsupported=tuple(_unsupported(raw, method)),
        raw=raw,
    )


def changes_base(raw: Mapping[str, Any]) -> bool:
    """Whether PEFT merges a LoRA adapter into what is left of the base after its decomposition."""
    return raw.get("kasa_config") is not None or str(raw.get("init_lora_weights")).lower() in ("olora", "pissa")


def _ingredients(method: str) -> tuple[str, str]:
    """The keys of the scale's numerator and denominator; empty where the formula has no scale."""
    if method == "LORA":
        return "lora_alpha", "r"
    known = methods().get(method)
    return (known.alpha, known.rank) if known and known.alpha else ("", "")


def _has_patterns(method: str) -> bool:
    """Whether its patterns are of modules and numbers; AdaLoRA's are of tensors and of the ranks that were kept."""
    return method == "LORA" or (method in methods() and methods()[method].patterns)


def _unsupported(raw: Mapping[str, Any], method: str) -> list[str]:
    if method != "LORA":
        return why_not(raw, method)
    reasons = [reason for key, reason in UNSUPPORTED.items() if raw.get(key)]
    init = str(raw.get("init_lora_weights") or False).lower()
    if init not in PLAIN_STARTS:
        reason = next((why for start, why in UNKNOWN_BASES.items() if init.startswith(start)), "no such start is known")
        reasons.append(f"init_lora_weights={raw['init_lora_weights']!r}: {reason}")
    unknown = [key for key, value in raw.items() if value and key not in WITHOUT_EFFECT | UNSUPPORTED.keys()]
    return reasons + [f"the configuration key {key!r} is not known to this version" for key in sorted(unknown)]


def _number(key: str, value: Any, where: str) -> float:
    """A finite number, as JSON has it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise _bad(key, value, where, "a finite number")
    return value


def _rank(key: str, value: Any, where: str) -> int:
    """A whole number of at least 1."""
    if _number(key, value, where) < 1 or value != int(value):
        raise _bad(key, value, where, "a whole number of at least 1")
    return int(value)


def _pattern(raw: Mapping[str, Any], key: str, parse: Callable[[str, Any, str], Any], where: str) -> Mapping[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, Mapping):
        raise _bad(key, value, where, "an object of patterns and numbers")
    return {_regex(key, pattern, where): parse(f"{key}[{pattern!r}]", one, where) for pattern, one in value.items()}


def _token_rows(raw: Mapping[str, Any], method: str, where: str) -> Mapping[str, tuple[int, ...]]:
    key = "token_indices" if method == "TRAINABLE_TOKENS" else "trainable_token_indices"
    value = raw.get(key)
    if not value:
        return {}
    rows = value if isinstance(value, Mapping) else {"": value}
    if not all(isinstance(one, Sequence) and all(isinstance(i, int) for i in one) for one in rows.values()):
        raise _bad(key, value, where, "lists of row numbers")
    return {str(module): tuple(indices) for module, indices in rows.items()}


def _targets(raw: Mapping[str, Any], where: str) -> str | tuple[str, ...]:
    """target_modules; nothing where other keys narrow it, for then it alone does not say what was adapted."""
    value = raw.get("target_modules")
    targets = _regex("target_modules", value, where) if isinstance(value, str) else _names(raw, "target_modules", where)
    narrowed = raw.get("layers_to_transform") is not None or raw.get("exclude_modules")
    return () if narrowed else targets


def _names(raw: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = raw.get(key) or ()
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise _bad(key, value, where, "a list of module names")
    return tuple(value)


def _regex(key: str, value: str, where: str) -> str:
    try:
        re.compile(value)
    except re.error as problem:
        raise _bad(key, value, where, f"a regular expression ({problem})") from None
    return value


def _bad(key: str, value: Any, where: str, wanted: str) -> AdapterConfigError:
    return AdapterConfigError(
        f"adapter_config.json of {where} has {key} = {value!r}, not {wanted}",
        hint="mend the configuration, or save the adapter again with save_pretrained",
    )

"""Tensors that are absent or new because MERGED is of another class than BASE: LC211 tells them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_check.faults._unpaired import unpaired
from lora_check.faults._wrapped import unwrapped, wrapped
from lora_check.types import Plan


def class_of(config: Mapping[str, Any]) -> str:
    """The class that a configuration names, or its model_type."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else str(config.get("model_type") or "")


def changed(plan: Plan) -> bool:
    """Whether both configurations name a class, and not the same."""
    base, merged = class_of(plan.base_config), class_of(plan.merged_config)
    return bool(base) and bool(merged) and base != merged


def lost(plan: Plan) -> tuple[str, ...]:
    """The tensors that another class had no place for; what may only have another name is left out."""
    told = {*unwrapped(plan), *unpaired(plan)}
    return tuple(name for name in plan.missing if name not in told) if changed(plan) else ()


def gained(plan: Plan) -> tuple[str, ...]:
    """The tensors that another class made anew."""
    told = {*wrapped(plan), *unpaired(plan).values()}
    return tuple(name for name in plan.extra if name not in told) if changed(plan) else ()

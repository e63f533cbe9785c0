"""Names that only an unmerged PEFT model has: LC207 tells them, LC201 and LC202 keep silent about them."""

from __future__ import annotations

import re

from lora_check.types import Plan

_PREFIX = "base_model.model."
_MARKS = (
    ".base_layer.",
    ".lora_A.",
    ".lora_B.",
    ".lora_magnitude_vector",
    ".modules_to_save.",
    ".original_module.",
    "lora_embedding_",
)
_WRAPPER = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")


def wrapped(plan: Plan) -> tuple[str, ...]:
    """The extra names of MERGED that a PEFT wrapper gave."""
    return tuple(name for name in plan.extra if name.startswith(_PREFIX) or any(mark in name for mark in _MARKS))


def unwrapped(plan: Plan) -> frozenset[str]:
    """The names that those tensors have in a model without wrappers."""
    return frozenset(_WRAPPER.sub("", name.removeprefix(_PREFIX)) for name in wrapped(plan))

"""How the keys of an adapter name modules, and the one rewriting after which they name those of BASE."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from lora_check.types import Adapter, Plan

PREFIX = "base_model.model."
_FACTOR = re.compile(r"\.(?:base_layer\.)*(?:lora_|token_adapter\.|modules_to_save\.)[^/]*$")
_OURS = re.compile(
    rf"{re.escape(PREFIX)}.*\.(?:lora_(?:A|B|diag)\.weight|lora_B\.bias|lora_magnitude_vector|lora_embedding_[AB])"
)
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module")
_FRONT = re.compile(r"^(?:module\.|base_model\.model\.)+")
_NUMBERS = re.compile(r"[0-9]+")

Rewrite = tuple[str, str]


def module_of(key: str) -> str:
    """The module that a key of PEFT names, with what a wrapper of the training put into it taken out."""
    plain = ".".join(name for name in key.split(".") if name not in _WRAPPERS)
    return _FRONT.sub("", _FACTOR.sub("", plain))


def modules_of(plan: Plan) -> frozenset[str]:
    """The modules of BASE that have a weight."""
    names = plan.base_metas or [one.base.name for one in plan.pairings if one.base]
    return frozenset(name.removesuffix(".weight") for name in names if name.endswith(".weight"))


def is_foreign(key: str, adapter: Adapter) -> bool:
    """Whether a key is not written as PEFT writes it, so that PEFT skips it without an error."""
    wrapped = key.startswith("module.") or any(name in _WRAPPERS for name in key.split("."))
    return adapter.dialect == "peft" and (wrapped or not _OURS.fullmatch(key))


def rewriting(modules: Collection[str], known: Collection[str]) -> Rewrite | None:
    """The only (old, new) that turns every one of these modules into a known one; None, if there is none or several.

    A beginning that changes is asked for first, then names in the middle.
    """
    if not modules or not known:
        return None
    first = min(modules)
    for changes, change in ((_beginnings, _begin), (_middles, _middle)):
        fitting = [one for one in changes(first, known) if all(change(name, *one) in known for name in modules)]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    return None


def rewritten(module: str, rewrite: Rewrite) -> str:
    """The module's path after the rewriting; nothing, if it is not in it."""
    return (_middle if rewrite[0].startswith(".") else _begin)(module, *rewrite)


def said(rewrite: Rewrite) -> str:
    """'model.language_model.' in place of 'model.'."""
    old, new = rewrite
    if not old:
        return f"{new!r} put in front"
    return f"{new!r} in place of {old!r}" if new else f"{old!r} taken off"


def is_base_prefix(rewrite: Rewrite, known: Iterable[str]) -> bool:
    """Whether one leading name comes or goes as it does between a model and its body: loaders see to that.

    A body's names begin in several ways; those of a whole model begin alike, but for its head.
    """
    old, new = rewrite
    if "" not in rewrite or (old + new).count(".") != 1:
        return False
    whole = {name.split(".")[0] for name in known if "." in name}
    return len(whole) > 1 if old else len(whole) == 1


def _beginnings(module: str, known: Iterable[str]) -> list[Rewrite]:
    """The changes of its beginning that make a known module of it, where two names or more stay at the end."""
    found: dict[Rewrite, bool] = {}
    for other in known:
        old, new = _without_common_end(module.split("."), other.split("."))
        if len(module.split(".")) - len(old) >= 2:
            found["".join(f"{name}." for name in old), "".join(f"{name}." for name in new)] = True
    return list(found)


def _begin(module: str, old: str, new: str) -> str:
    return f"{new}{module.removeprefix(old)}" if module.startswith(old) else ""


def _middles(module: str, known: Iterable[str]) -> list[Rewrite]:
    """The changes of names in its middle; numbers stay what they are."""
    found: dict[Rewrite, bool] = {}
    names, numbers = module.split("."), _NUMBERS.findall(module)
    for other in known:
        theirs = other.split(".")
        if names[-1] == theirs[-1] and _NUMBERS.findall(other) == numbers:
            old, new = _without_common_end(names, theirs)
            old, new = (one[::-1] for one in _without_common_end(old[::-1], new[::-1]))
            if old and new:
                found[f".{'.'.join(old)}.", f".{'.'.join(new)}."] = True
    return list(found)


def _middle(module: str, old: str, new: str) -> str:
    return f".{module}.".replace(old, new, 1).strip(".") if old in f".{module}." else ""


def _without_common_end(one: list[str], other: list[str]) -> tuple[list[str], list[str]]:
    """Both without the names at the end that they share."""
    shared = 0
    while shared < min(len(one), len(other)) and one[-1 - shared] == other[-1 - shared]:
        shared += 1
    return one[: len(one) - shared], other[: len(other) - shared]

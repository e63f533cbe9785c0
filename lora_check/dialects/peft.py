"""PEFT's adapters: adapter_config.json of any age, and the key grammar

    base_model.model.<module path>.<factor>[.weight|.bias]
            factor: lora_A, lora_B, lora_diag, lora_embedding_A, lora_embedding_B or lora_magnitude_vector
    base_model.model.<module path>.token_adapter.trainable_tokens_delta
    base_model.model.<parameter path>                    a tensor carried whole, in place of the base's

`.base_layer` segments are PEFT's wrappers and are removed. Keys without the prefix, with the prefixes of DDP, FSDP or
torch.compile, or with the adapter's name left in are read too, and told (LC005): most PEFT releases load nothing from
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.adapters.config import parse_config
from lora_check.adapters.methods import methods
from lora_check.types import Adapter, Checkpoint, Dialect, Method, Part

PREFIX = "base_model.model."
SHARED = "base_model."
DISTRIBUTED = "module."
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module")
ROLES = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_diag": "diag",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "m",
    "trainable_tokens_delta": "rows",
}
OF_TRAINING = {"lora_monteclora_sampler": "monteclora_config", "lora_velora_embed": "velora_config"}
"""State of LoRA's variants that no forward pass of a trained model reads, merged or not -> the key that turns it on."""
_FACTOR = re.compile(
    rf"(?P<module>.+?)\.(?:token_adapter\.)?(?P<factor>{'|'.join(ROLES)})"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<leaf>.+)")


def recognises(config: Mapping[str, Any], names: Sequence[str]) -> bool:
    """A configuration with PEFT's `peft_type`, or tensors in PEFT's grammar."""
    return "peft_type" in config or any(_FACTOR.fullmatch(name) for name in names)


def read(raw: Mapping[str, Any], checkpoint: Checkpoint) -> Adapter:
    """Parse configuration and names; headers only.

    raises   AdapterConfigError: a value that cannot be, naming key and value
    """
    config = parse_config(raw, checkpoint.location)
    names, foreign = _inner_names(tuple(checkpoint.metas()), _shared(methods().get(config.method)))
    kept = {stored: inner for stored, inner in names.items() if not _of_training(inner, raw)}
    read_as = {stored: _part(stored, inner, config.method) for stored, inner in kept.items()}
    parts = tuple(part for part in read_as.values() if part is not None)
    return Adapter(
        config=config,
        checkpoint=checkpoint,
        dialect="peft",
        parts=_of_each_kind(parts) if config.method == "FROD" else parts,
        orphans=tuple(stored for stored, part in read_as.items() if part is None),
        foreign_prefix=foreign or _adapter_name(names.values()),
    )


def _inner_names(stored: Sequence[str], shared: re.Pattern[str]) -> tuple[dict[str, str], str]:
    """Stored name -> module path and suffix; and what is foreign to PEFT in the first name that has such a thing."""
    names, foreign = {}, ""
    for name in stored:
        plain = ".".join(segment for segment in name.removeprefix(DISTRIBUTED).split(".") if segment not in WRAPPERS)
        names[name] = plain.removeprefix(PREFIX)
        if not foreign and plain != name:
            foreign = "segments of a wrapper"
        if not foreign and not plain.startswith(PREFIX) and not shared.fullmatch(plain):
            foreign = f"no {PREFIX!r}"
    return names, foreign


def _adapter_name(names: Any) -> str:
    for inner in names:
        match = _FACTOR.fullmatch(inner) or _SAVED.fullmatch(inner)
        if match and match["adapter"]:
            return f"adapter name {match['adapter']!r} left in the keys"
    return ""


def _of_training(inner: str, raw: Mapping[str, Any]) -> bool:
    """Whether a tensor is state of the training that its configuration speaks of."""
    return any(raw.get(key) and f".{name}." in f"{inner}." for name, key in OF_TRAINING.items())


def _part(stored: str, inner: str, method: str) -> Part | None:
    wrapped = ".base_layer" in inner
    plain = inner.replace(".base_layer", "")
    if method != "LORA":
        return _part_of_method(stored, plain, methods().get(method), wrapped)
    if factor := _FACTOR.fullmatch(plain):
        if factor["leaf"] == "bias":
            return Part(tensor=stored, module=factor["module"], role="bias") if factor["factor"] == "lora_B" else None
        depth = inner.count(".base_layer")
        return Part(tensor=stored, module=factor["module"], role=ROLES[factor["factor"]], depth=depth)
    if saved := _SAVED.fullmatch(plain):
        return Part(tensor=stored, module=f"{saved['module']}.{saved['leaf']}", role="S")
    if "lora_" in plain or ".original_module." in plain:
        return None
    return Part(tensor=stored, module=plain, role="S", wrapped=wrapped)


def _part_of_method(stored: str, plain: str, method: Method | None, wrapped: bool) -> Part | None:
    """A tensor of a type other than LoRA: one that its modules share, a factor, or a tensor carried whole."""
    if method is None:
        return Part(tensor=stored, module=plain, role="unknown", wrapped=wrapped)
    if shared := _shared(method).fullmatch(plain):
        return Part(tensor=stored, module=shared["module"] or "", role=_role(method.shared, shared["name"]))
    if factor := _grammar(method).fullmatch(plain):
        return Part(tensor=stored, module=factor["module"], role=_role(method.roles, factor["factor"]))
    if saved := _SAVED.fullmatch(plain):
        return Part(tensor=stored, module=f"{saved['module']}.{saved['leaf']}", role="S")
    if other := _of_another(plain):
        return Part(tensor=stored, module=other, role="unknown", wrapped=wrapped)
    if f".{method.name.lower()}_" in plain or ".original_module." in plain:
        return None
    return Part(tensor=stored, module=plain, role="S", wrapped=wrapped)


def _of_each_kind(parts: Sequence[Part]) -> tuple[Part, ...]:
    """FRoD's projections, which it keeps once for all modules of a kind, given to each of those modules."""
    modules = dict.fromkeys(part.module for part in parts if part.role == "l")
    return tuple(
        replace(part, module=module)
        for part in parts
        for module in ([one for one in modules if _kind(one) == part.module] or [part.module])
    )


def _kind(module: str) -> str:
    """The last two names of a module's path, or the last one where a number stands before it.

    Source: PEFT tuners/frod/model.py _category_from_key.
    """
    *path, last = module.split(".")
    if not path or path[-1].isdigit():
        return last
    return "attention_output" if [*path[-2:], last] == ["attention", "output", "dense"] else f"{path[-1]}_{last}"


def _of_another(plain: str) -> str:
    """The module of a factor of another type than the configuration says; nothing, if it is none."""
    found = (grammar.fullmatch(plain) for grammar in (_FACTOR, *map(_grammar, methods().values())))
    return next((match["module"] for match in found if match), "")


def _grammar(method: Method) -> re.Pattern[str]:
    """<module>.<ending>[.<adapter name>][.weight]; the `*` of an ending is any one segment."""
    known = "|".join(re.escape(one).replace(r"\*", r"[^.]+") for one in method.roles)
    return re.compile(rf"(?P<module>.+)\.(?P<factor>{known})(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?")


def _shared(method: Method | None) -> re.Pattern[str]:
    """base_model.<name>[.<module>]: what lies on the model and not on one of its layers."""
    names = [re.escape(one).replace(r"\*", r"[^.]+") for one in (method.shared if method else ())]
    known = "|".join(names) or "(?!)"
    return re.compile(rf"(?:{re.escape(SHARED)})?(?P<name>{known})(?:\.(?P<module>.+))?")


def _role(roles: Mapping[str, str], ending: str) -> str:
    """The role of an ending, with the segment that stood for its `*`."""
    for pattern, role in roles.items():
        head, star, tail = pattern.partition("*")
        if not star and ending == pattern:
            return role
        if star and ending.startswith(head) and ending.endswith(tail):
            return role.replace("*", ending[len(head) : len(ending) - len(tail)])
    raise AssertionError(ending)


DIALECT = Dialect(name="peft", recognises=recognises, read=read)

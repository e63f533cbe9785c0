"""What an adapter's configuration says of its file and of the base: which modules, biases and copies there must be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lora_check.links import lookup
from lora_check.types import Adapter, Checkpoint, Part


def is_target(module: str, targets: str | tuple[str, ...]) -> bool:
    """Whether target_modules names a module: by a pattern for the whole path, by the path or by a dotted end of it."""
    if isinstance(targets, str):
        return targets != "all-linear" and re.fullmatch(targets, module) is not None
    return any(module == one or module.endswith(f".{one}") for one in targets)


def unused(modules: Mapping[str, Sequence[Part]]) -> list[tuple[str, Part]]:
    """Weights carried under the plain name of a module with factors: PEFT reads those as `base_layer.weight` only."""
    return [
        (module, part)
        for module, parts in modules.items()
        for part in parts
        if part.role == "S" and not part.wrapped and module.endswith(".weight")
        if any(one.role not in ("S", "bias", "rows") for one in modules.get(module.removesuffix(".weight"), ()))
    ]


def promises(adapter: Adapter, modules: Mapping[str, Sequence[Part]], base: Checkpoint) -> list[str]:
    """What the configuration says the file holds, and it does not."""
    saved = [module.rpartition(".")[0] for module, parts in modules.items() if any(p.role == "S" for p in parts)]
    known = {name.rpartition(".")[0] for name in base.metas()}
    broken = [
        f"modules_to_save names {name!r}, and the file carries no such module"
        for name in adapter.config.saved
        if any(_ends(module, name) for module in known) and not any(_ends(module, name) for module in saved)
    ]
    roles = {part.role for parts in modules.values() for part in parts}
    if adapter.config.token_rows and "rows" not in roles:
        broken.append("trainable_token_indices names rows, and the file carries none")
    if adapter.config.lora_bias and "A" in roles and "bias" not in roles:
        broken.append("lora_bias is on, and the file carries no bias of lora_B")
    if _trained_biases(adapter, modules, base) and not any(module.endswith(".bias") for module in modules):
        broken.append(f"bias={adapter.config.biases!r} trains biases of BASE, and the file carries none")
    return broken


def _trained_biases(adapter: Adapter, modules: Mapping[str, Sequence[Part]], base: Checkpoint) -> bool:
    """Whether BASE has a bias that the configuration says was trained: any, or one of an adapted module."""
    if adapter.config.biases.endswith("_only"):
        return any(lookup(f"{module}.bias", base.metas(), base.config) for module in modules)
    return adapter.config.biases == "all" and any(name.endswith(".bias") for name in base.metas())


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")

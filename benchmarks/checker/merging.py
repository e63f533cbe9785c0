"""Merged checkpoints, right and broken, made shard by shard in plain torch. Nothing of lora_check is used here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from torch import Tensor

    Rule = Callable[[str, Tensor, Tensor], Tensor | None]

LEFT_OUT = "model.layers.1."
TOO_LARGE = "model.layers.2.mlp.down_proj.weight"
EXCESS = 1.02
"""The factor on the one delta that is too large."""


def right(_: str, base: Tensor, delta: Tensor) -> Tensor:
    """Add in fp32, store once: what PEFT's merge_and_unload does."""
    return (base.float() + delta).to(base.dtype)


def rounded(_: str, base: Tensor, delta: Tensor) -> Tensor:
    """Round the delta, then add: what PEFT's merge_and_unload(safe_merge=True) does."""
    return base + delta.to(base.dtype)


def skipped(name: str, base: Tensor, _: Tensor) -> Tensor | None:
    """One layer is left as it was in the base."""
    return base if name.startswith(LEFT_OUT) else None


def scaled(name: str, base: Tensor, delta: Tensor) -> Tensor | None:
    """The delta of one tensor is 2 % too large."""
    return right(name, base, EXCESS * delta) if name == TOO_LARGE else None


RULES = {"right": right, "rounded": rounded, "skipped": skipped, "scaled": scaled}


class Deltas:
    """The deltas of an adapter folder, made on demand: s B A, (out, in), fp32."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        self.scale = config["lora_alpha"] / config["r"]
        self.file = safe_open(folder / "adapter_model.safetensors", "pt")
        names = (name for name in self.file.keys() if name.endswith(".lora_A.weight"))  # noqa: SIM118  no mapping
        self.stems = {stem(name): name.removesuffix(".lora_A.weight") for name in names}

    def __contains__(self, name: str) -> bool:
        return name in self.stems

    def __getitem__(self, name: str) -> Tensor:
        found = self.stems[name]
        a, b = (self.file.get_tensor(f"{found}.lora_{letter}.weight").float() for letter in "AB")
        return self.scale * (b @ a)


def stem(factor: str) -> str:
    """base_model.model.X.lora_A.weight -> X.weight, the name of the tensor it changes."""
    return factor.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"


def write(rule: str, base: Path, adapter: Path, out: Path, like: Path | None = None) -> None:
    """Write the merged checkpoint that a rule makes; a tensor that the rule leaves is that of `like`.

    like   a merged checkpoint in the base's shards; shards in which nothing changes are its files, linked
    """
    out.mkdir(parents=True)
    deltas = Deltas(adapter)
    for file in sorted(base.iterdir()):
        if file.suffix == ".safetensors":
            _shard(RULES[rule], file, deltas, out / file.name, like / file.name if like else None)
        elif file.name.endswith(".json"):
            shutil.copyfile(file, out / file.name)


def _shard(rule: Rule, base: Path, deltas: Deltas, out: Path, like: Path | None) -> None:
    """One shard; only that much is held."""
    changed: dict[str, Tensor] = {}
    with safe_open(base, "pt") as opened:
        names = list(opened.keys())
        for name in names:
            if name in deltas and (made := rule(name, opened.get_tensor(name), deltas[name])) is not None:
                changed[name] = made
        if like and not changed:
            os.link(like, out)
            return
        with safe_open(like or base, "pt") as rest:
            tensors = {name: changed[name] if name in changed else rest.get_tensor(name) for name in names}
            save_file(tensors, out, metadata={"format": "pt"})

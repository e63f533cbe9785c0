"""Adapters of every tuner, damaged in shapes, numbers and configuration: never verified, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tuner_worlds
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_check
from lora_check.types import Verdict

FACTORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ONE_EACH = {recipe.tuner: name for name, recipe in reversed(tuner_worlds.RECIPES.items())}
"""The first world of each tuner."""

WITH_MORE = ("oft-bias-all", "loha-llama-saved-head")
"""Worlds that carry whole tensors beside their factors."""

DAMAGES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "no axis": lambda x: x.reshape(-1)[0].clone(),
    "four axes": lambda x: x.reshape(1, 1, 1, -1).clone(),
    "a row short": lambda x: x[:-1].clone() if x.ndim else x,
    "a column short": lambda x: x[..., :-1].clone() if x.ndim else x,
    "empty": lambda x: x[:0].clone() if x.ndim else x,
    "not a number": lambda x: x * float("nan") if x.is_floating_point() else x,
}
VALUES = ("x", -3, [1], {"q": 1}, 0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuner_worlds.World]:
    root = tmp_path_factory.mktemp("damaged-tuners")
    return lambda name: tuner_worlds.build(name, root, "fp32", safe=False)


def verdict(world: tuner_worlds.World, adapter: Path) -> Verdict | None:
    """What the checker says; None for one sentence."""
    adapters = [adapter, *world.adapter_dirs[1:]]
    try:
        return lora_check.check(world.base_dir, adapters, world.merged["fp32", False], jobs=1).verdict
    except lora_check.LoraCheckError:
        return None


@pytest.mark.parametrize("name", ONE_EACH.values(), ids=list(ONE_EACH))
def test_damaged_factors_are_never_verified_and_never_a_traceback(made, tmp_path, name) -> None:
    world, adapter = made(name), tmp_path / "adapter"
    shutil.copytree(world.adapter_dirs[0], adapter)
    factors = load_file(adapter / FACTORS)
    kinds = {key.rpartition(".")[2]: key for key, tensor in factors.items() if tensor.is_floating_point()}
    for key in kinds.values():
        for word, damage in DAMAGES.items():
            changed = damage(factors[key])
            if changed.shape != factors[key].shape or bool(changed.isnan().any()):
                save_file({**factors, key: changed}, adapter / FACTORS, metadata={"format": "pt"})
                unread = key.endswith(".zeros")
                assert verdict(world, adapter) is not Verdict.VERIFIED or unread, (key, word)


@pytest.mark.parametrize("name", [*ONE_EACH.values(), *WITH_MORE], ids=[*ONE_EACH, *WITH_MORE])
def test_a_configuration_with_impossible_values_is_never_a_traceback(made, tmp_path, name) -> None:
    world, adapter = made(name), tmp_path / "adapter"
    shutil.copytree(world.adapter_dirs[0], adapter)
    config: dict[str, Any] = json.loads((adapter / CONFIG).read_text())
    for key in config.keys() - {"peft_type", "base_model_name_or_path", "revision", "task_type", "peft_version"}:
        for value in VALUES:
            (adapter / CONFIG).write_text(json.dumps({**config, key: value}))
            verdict(world, adapter)


def test_every_tuner_is_damaged_here() -> None:
    assert len(ONE_EACH) == 34

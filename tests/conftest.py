"""Fixtures of all tests: one thread, no network, each live-PEFT world made once, and copies of its files to spoil."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import peft_worlds
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

torch.set_num_threads(1)


@dataclass(frozen=True)
class Inputs:
    """Where base, adapters and merged of one world lie, as `check` and the command line take them."""

    base: Path
    adapters: tuple[Path, ...]
    merged: Path

    @property
    def args(self) -> tuple[Path, list[Path], Path]:
        """The positional arguments of `check`."""
        return self.base, list(self.adapters), self.merged

    @property
    def argv(self) -> list[str]:
        """The positional arguments of the command line."""
        return [str(path) for path in (self.base, *self.adapters, self.merged)]

    def but(self, **places: object) -> Inputs:
        """The same with one of the three somewhere else."""
        return replace(self, **places)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Inputs]:
    """(name, dtype, safe) -> the files of that world, made by PEFT at the first call; nobody may change them."""
    root = tmp_path_factory.mktemp("peft-worlds")
    known: dict[tuple[str, str, bool], Inputs] = {}

    def get(name: str, dtype: str = "fp32", safe: bool = False) -> Inputs:
        key = (name, dtype, safe)
        if key not in known:
            made = peft_worlds.build(name, root, dtype, safe)
            known[key] = Inputs(made.base_dir, made.adapter_dirs, made.merged[dtype, safe])
        return known[key]

    return get


@pytest.fixture(scope="session")
def load() -> Callable[[Path], dict[str, Tensor]]:
    """Folder -> its tensors, whichever of the layouts of PEFT and transformers is there."""

    def read(folder: Path) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            found |= load_file(path)
        for path in [] if found else sorted(folder.glob("*.bin")):
            found |= torch.load(path, weights_only=True)
        assert found, folder
        return found

    return read


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """(tensors, folder to take the JSON files from) -> a new folder with one weight file."""
    made: list[Path] = []

    def write(tensors: Mapping[str, Tensor], like: Path, file: str = "model.safetensors") -> Path:
        folder = tmp_path / f"saved-{len(made)}"
        made.append(folder)
        folder.mkdir()
        for path in (like / "config.json", like / "adapter_config.json"):
            if path.exists():
                shutil.copy(path, folder)
        whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        if file.endswith(".safetensors"):
            save_file(whole, folder / file, metadata={"format": "pt"})
        else:
            torch.save(whole, folder / file)
        return folder

    return write

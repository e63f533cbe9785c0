"""The script that people write: W + (alpha / r) B A of whole tensors, and allclose in a loop.

`python -m benchmarks.checker.arms._script BASE ADAPTER MERGED [rtol atol]`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.checker.arms import _answers as answers

if TYPE_CHECKING:
    from torch import Tensor


def main(base: str, adapter: str, merged: str, *tolerances: str) -> None:
    """Load both state dicts and the adapter, recompute every target, compare everything."""
    import torch

    allowed = dict(zip(("rtol", "atol"), map(float, tolerances), strict=False))
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    before, factors, after = (load(Path(folder)) for folder in (base, adapter, merged))
    differing = sum(name not in after for name in before)
    for name, actual in after.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (factors.get(f"{stem}.lora_{letter}.weight") for letter in "AB")
        if name not in before:
            differing += 1
        elif a is None or b is None:
            differing += not torch.equal(before[name], actual)
        else:
            expected = (before[name].float() + scale * (b.float() @ a.float())).to(actual.dtype)
            differing += not torch.allclose(expected, actual, **allowed)
    answers.tell(differing, len(after))


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


if __name__ == "__main__":
    main(*sys.argv[1:])

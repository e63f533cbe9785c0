"""A base, an adapter and a merge of many small tensors, made in plain torch: work enough to be interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

OUT, IN, R, ALPHA = 96, 72, 5, 7
FAMILIES = ("q_proj", "v_proj")
TIMING = ("seconds", "gb_per_second", "cpu_seconds", "read_ceiling_gb_per_second", "bound")


def make(root: Path, layers: int, *, out: int = OUT, broken: bool = False) -> list[str]:
    """Write the three folders; the positional arguments of a report on them.

    broken   every v_proj was merged twice, one q_proj was left out, and one norm was changed
    """
    random = torch.Generator().manual_seed(layers)
    base, factors, merged = {}, {}, {}
    for layer in range(layers):
        norm = f"model.layers.{layer}.input_layernorm.weight"
        base[norm] = (1 + 0.1 * torch.randn(IN, generator=random)).bfloat16()
        merged[norm] = base[norm] + (broken and layer == 2)
        for family in FAMILIES:
            module = f"model.layers.{layer}.self_attn.{family}"
            w = (0.05 * torch.randn(out, IN, generator=random)).bfloat16()
            a, b = 0.1 * torch.randn(R, IN, generator=random), 0.1 * torch.randn(out, R, generator=random)
            times = (2 if family == "v_proj" else int(layer != 1)) if broken else 1
            base[f"{module}.weight"] = w
            merged[f"{module}.weight"] = (w.float() + times * ALPHA / R * (b @ a)).bfloat16()
            factors |= {f"base_model.model.{module}.lora_{side}.weight": x for side, x in (("A", a), ("B", b))}
    told = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": list(FAMILIES)}
    names = {"base": "model.safetensors", "adapter": "adapter_model.safetensors", "merged": "model.safetensors"}
    for name, tensors in (("base", base), ("adapter", factors), ("merged", merged)):
        (root / name).mkdir(parents=True)
        save_file(tensors, root / name / names[name], {"format": "pt"})
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(told))
    return [str(root / name) for name in names]


def plain(told: Any) -> Any:
    """The JSON of a report without what a clock told."""
    found = json.loads(json.dumps(told))
    for key in TIMING:
        found["summary"].pop(key, None)
    return found

"""Build tiny models whose files and loaded parameters have different names or pieces, and PEFT's merges of them.

Each world is one architecture of transformers with one kind of target. Sizes differ from one another, but for the
worlds whose experts are square on purpose.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES: Mapping[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Recipe:
    """Say how one world is made: a class of transformers, changes to its sizes, and what LoRA targets."""

    model: str
    config: str
    lora: Mapping[str, Any]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False  # the sizes are all there is


def _moe(model: str, targets: list[str], *, modules: list[str] | None = None, **sizes: Any) -> Recipe:
    lora = {"target_parameters": targets, "target_modules": modules or [], "rank_pattern": {}}
    return Recipe(f"{model}ForCausalLM", f"{model}Config", lora, sizes)


_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}

RECIPES: Mapping[str, Recipe] = {
    "mixtral": _moe("Mixtral", _EXPERTS, modules=["q_proj"], num_local_experts=3),
    "mixtral-one": _moe("Mixtral", _EXPERTS[1:], num_local_experts=3),
    "mixtral-square": _moe("Mixtral", _EXPERTS, num_local_experts=3, intermediate_size=12),
    "qwen3-moe": _moe("Qwen3Moe", _EXPERTS, num_experts=3, moe_intermediate_size=10, num_experts_per_tok=2),
    "gpt-oss": _moe("GptOss", _EXPERTS, modules=["v_proj"], num_local_experts=3, num_experts_per_tok=2),
    "gpt-oss-square": _moe("GptOss", _EXPERTS, num_local_experts=3, num_experts_per_tok=2, intermediate_size=24),
    "llama4": _moe(
        "Llama4", ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"], num_local_experts=3
    ),
    "phi3": Recipe("Phi3ForCausalLM", "Phi3Config", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "llava": Recipe(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
        {
            "text_config": {**SIZES, "model_type": "llama", "vocab_size": 44},
            "vision_config": {**_VISION, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
            "image_token_index": 43,
            "tie_word_embeddings": False,
        },
        plain=True,
    ),
    "vit": Recipe(
        "ViTForImageClassification",
        "ViTConfig",
        {"target_modules": ["query", "value", "q_proj", "v_proj"]},
        {**_VISION, "image_size": 8, "patch_size": 4, "num_labels": 3},
        plain=True,
    ),
}


def cases() -> list[tuple[str, str]]:
    return [(name, dtype) for name in RECIPES for dtype in DTYPES]


def build(name: str, root: Path, dtype: str) -> tuple[Path, Path, Path]:
    """Folders of base, adapter and PEFT's merge."""
    home = Path(root) / f"{name}-{dtype}"
    base, adapter, merged = home / "base", home / "adapter", home / "merged"
    if merged.exists():
        return base, adapter, merged
    recipe = RECIPES[name]
    torch.manual_seed(len(name))
    sizes = recipe.sizes if recipe.plain else {**SIZES, **recipe.sizes}
    config_class = getattr(transformers, recipe.config)
    if recipe.model.startswith("Llama4"):
        config_class = transformers.Llama4TextConfig
    model: PreTrainedModel = getattr(transformers, recipe.model)(config_class(**sizes))
    for parameter in model.parameters():
        parameter.data.copy_(0.05 * torch.randn_like(parameter) + (1 if parameter.ndim == 1 else 0))
    model.to(DTYPES[dtype]).save_pretrained(base)
    tuned = get_peft_model(_load(recipe, base, dtype), LoraConfig(r=3, lora_alpha=7, **recipe.lora))
    for key, parameter in tuned.named_parameters():
        if "lora_" in key:
            parameter.data.copy_(0.08 * torch.randn_like(parameter))
    tuned.save_pretrained(adapter)
    PeftModel.from_pretrained(_load(recipe, base, dtype), adapter).merge_and_unload().save_pretrained(merged)
    return base, adapter, merged


def _load(recipe: Recipe, folder: Path, dtype: str) -> nn.Module:
    return getattr(transformers, recipe.model).from_pretrained(folder, dtype=DTYPES[dtype])


Maker = Callable[[str, Path, str], tuple[Path, Path, Path]]

"""The parameters that `inspect` predicts, against the model that PEFT really makes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from lora_check.adapters.config import parse_config
from lora_check.errors import InputError
from lora_check.inspection.attach import Attached, attach
from lora_check.inspection.model import Model, of_class, of_headers
from lora_check.locations import open_checkpoint

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
Named = dict[str, tuple[tuple[int, ...], bool]]


def llama(**told: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **{**LLAMA, **told}))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=2, n_head=2, n_positions=16, vocab_size=40))


def bert() -> BertForSequenceClassification:
    small = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 1}
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **small))


def bloom() -> BloomForCausalLM:
    return BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=12, n_layer=2, n_head=2))


def glm() -> GlmForCausalLM:
    return GlmForCausalLM(GlmConfig(vocab_size=40, head_dim=4, pad_token_id=0, **LLAMA))


def resnet() -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=6, hidden_sizes=[6, 10], depths=[1, 1], layer_type="basic", num_labels=3)
    )


CASES: Mapping[str, tuple[Callable[[], nn.Module], Mapping[str, Any]]] = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "llama, one pattern": (llama, {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"}),
    "llama, all linear": (llama, {"target_modules": "all-linear"}),
    "llama, patterns": (
        llama,
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5, "up_proj": 2}},
    ),
    "llama, one layer": (llama, {"target_modules": ["k_proj"], "layers_to_transform": [1]}),
    "llama, one layer by name": (
        llama,
        {"target_modules": ["k_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "llama, excluded": (
        llama,
        {"target_modules": ["k_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.o_proj"]},
    ),
    "llama, DoRA": (llama, {"target_modules": ["q_proj", "gate_proj"], "use_dora": True}),
    "llama, head and embedding saved": (
        lambda: llama(tie_word_embeddings=False),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "llama, embedding adapted": (llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "llama, head adapted": (lambda: llama(tie_word_embeddings=False), {"target_modules": ["lm_head", "v_proj"]}),
    "llama, rows trained": (llama, {"target_modules": ["v_proj"], "trainable_token_indices": [3, 5, 9]}),
    "llama, tied, rows trained": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
    ),
    "llama with biases, only those of LoRA": (
        lambda: llama(attention_bias=True, mlp_bias=True),
        {"target_modules": ["q_proj"], "bias": "lora_only"},
    ),
    "llama with biases, all": (
        lambda: llama(attention_bias=True, mlp_bias=True),
        {"target_modules": ["q_proj", "down_proj"], "bias": "all", "lora_bias": True},
    ),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, DoRA and biases": (
        gpt2,
        {"target_modules": ["c_attn"], "use_dora": True, "bias": "lora_only", "fan_in_fan_out": True},
    ),
    "gpt2, embedding adapted": (gpt2, {"target_modules": ["wte", "wpe", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, rows of its tokens trained, none of its positions": (
        gpt2,
        {"target_modules": ["c_attn"], "trainable_token_indices": [1, 4], "fan_in_fan_out": True},
    ),
    "gpt2, tied head adapted": (gpt2, {"target_modules": ["lm_head", "mlp.c_proj"], "fan_in_fan_out": True}),
    "gpt2, tied head saved": (
        gpt2,
        {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"], "fan_in_fan_out": True},
    ),
    "bert, head saved": (
        bert,
        {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    ),
    "bert, pooler saved whole": (bert, {"target_modules": ["value"], "modules_to_save": ["pooler", "classifier"]}),
    "bloom, fused": (bloom, {"target_modules": ["query_key_value", "dense_4h_to_h"]}),
    "glm, fused": (glm, {"target_modules": ["gate_up_proj", "o_proj"]}),
    "resnet": (resnet, {"target_modules": ["convolution"], "modules_to_save": ["classifier.1"]}),
}
CLASS_ONLY = ("resnet",)
"""Where headers do not tell what a module is: whether a convolution is grouped."""


def live(model: nn.Module, told: Mapping[str, Any]) -> tuple[Named, dict[str, Any]]:
    """What PEFT calls them, and the configuration that it would write."""
    config = LoraConfig(r=3, lora_alpha=7, **told)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights and of bias: no forward is run here
        peft = get_peft_model(model, config)
    raw = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return {name: (tuple(one.shape), one.requires_grad) for name, one in peft.named_parameters()}, raw


def named(found: Attached) -> Named:
    assert not found.reasons
    assert len({one.name for one in found.parameters}) == len(found.parameters)
    return {one.name: (one.shape, one.trained) for one in found.parameters}


def models(model: Any, folder: Path) -> dict[str, Model]:
    """The same model by its headers and by its config.json alone."""
    model.save_pretrained(folder / "whole")
    raw = json.loads((folder / "whole" / "config.json").read_text())
    return {"headers": of_headers(open_checkpoint(folder / "whole", role="base")), "class": of_class(raw, "here")}


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_and_training_are_those_of_peft(case: str, tmp_path: Path) -> None:
    make, told = CASES[case]
    torch.manual_seed(0)
    model = make()
    known = models(model, tmp_path)
    sizes = {how: one.size for how, one in known.items()}
    assert set(sizes.values()) == {sum(one.numel() for one in model.parameters())}
    truth, raw = live(model, told)
    config = parse_config(json.loads(json.dumps(raw, default=str)), "here")
    for how, one in known.items():
        if how == "headers" and case in CLASS_ONLY:
            with pytest.raises(InputError, match="ungrouped convolution, as far as its headers can tell"):
                attach(one, config)
        else:
            assert named(attach(one, config)) == truth, how

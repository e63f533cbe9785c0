"""Two adapters that touch the same places, merged by live PEFT in one call."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_worlds import EXPECTED_WARNINGS
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lora_check

NAMES = ["one", "two"]


def small_llama() -> LlamaForCausalLM:
    """An untied Llama of two layers."""
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=False, **shape))


def train(base: LlamaForCausalLM, folder: Path, rank: int, seed: int, **options: object) -> None:
    """Save an adapter whose every tensor is random."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=7, target_modules=["q_proj", "embed_tokens"], **options)
    tuned = get_peft_model(copy.deepcopy(base), config)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(std=0.1)
    tuned.save_pretrained(folder)


@pytest.fixture
def merged(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """base, one, two, and what PEFT merges of them, under one folder."""
    with warnings.catch_warnings():
        for category, message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        make(tmp_path, getattr(request, "param", {}))
    return tmp_path


def make(root: Path, options: dict[str, object]) -> None:
    """Save base, two adapters and their merge."""
    torch.manual_seed(0)
    base = small_llama()
    base.save_pretrained(root / "base")
    for number, name in enumerate(NAMES):
        train(base, root / name, 3 + number, number + 1, **options)
    model = PeftModel.from_pretrained(copy.deepcopy(base), root / "one", adapter_name="one")
    model.load_adapter(root / "two", adapter_name="two")
    model.merge_and_unload(adapter_names=NAMES).save_pretrained(root / "merged")


def check(root: Path) -> lora_check.Report:
    """Report the folder that `merged` made."""
    return lora_check.check(root / "base", [root / name for name in NAMES], root / "merged", jobs=1)


def test_two_adapters_that_both_carry_the_base_embedding_are_verified(merged: Path) -> None:
    assert check(merged).verdict is lora_check.Verdict.VERIFIED


def test_an_embedding_with_the_second_delta_only_is_refuted(merged: Path) -> None:
    file = merged / "merged" / "model.safetensors"
    tensors = load_file(file)
    factors = load_file(merged / "two" / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens"
    a, b = factors[f"{prefix}.lora_embedding_A"], factors[f"{prefix}.lora_embedding_B"]
    tensors["model.embed_tokens.weight"] = factors[f"{prefix}.base_layer.weight"] + (b @ a).T * (7 / 4)
    save_file(tensors, file, metadata={"format": "pt"})
    report = check(merged)
    assert report.verdict is lora_check.Verdict.REFUTED
    assert [one.tensor for one in report.comparisons if one.code] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("merged", [{"modules_to_save": ["lm_head"]}], indirect=True)
def test_a_head_that_both_adapters_bring_is_not_decided(merged: Path) -> None:
    report = check(merged)
    assert report.verdict is lora_check.Verdict.INCONCLUSIVE
    assert [one.tensor for one in report.comparisons if one.verdict is not lora_check.Verdict.VERIFIED] == [
        "lm_head.weight"
    ]

"""Small models of every kind that `forward` runs, an adapter each, and PEFT's own merge of them, on disk."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft_worlds import EXPECTED_WARNINGS
from torch import nn

WORDS = 60
BERT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
ROBERTA = {**BERT, "max_position_embeddings": 34, "pad_token_id": 1}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64}
LLAMA = {**BERT, "num_key_value_heads": 1, "max_position_embeddings": 64}
T5 = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3, "decoder_start_token_id": 0}
BART = {
    "d_model": 24,
    **{f"{one}_{key}": value for one in ("encoder", "decoder") for key, value in {"layers": 2, "ffn_dim": 40}.items()},
    **{f"{one}_attention_heads": 3 for one in ("encoder", "decoder")},
}


@dataclass(frozen=True, slots=True)
class Sort:
    """One class of transformers, its sizes, what an adapter of it touches, and the first module that departs."""

    cls: str
    sizes: dict[str, Any]
    targets: tuple[str, ...]
    first: str
    task: str | None = None
    more: dict[str, Any] | None = None


SORTS = {
    "masked": Sort("BertForMaskedLM", BERT, ("query", "value", "dense"), "bert.encoder.layer.0.attention.self.query"),
    "tokens": Sort(
        "BertForTokenClassification", {**BERT, "num_labels": 5}, ("query",), "bert.encoder.layer.0.attention.self.query"
    ),
    "sequences": Sort(
        "RobertaForSequenceClassification",
        {**ROBERTA, "num_labels": 3},
        ("value",),
        "roberta.encoder.layer.0.attention.self.value",
        "SEQ_CLS",
    ),
    "one number": Sort(
        "GPT2ForSequenceClassification",
        {**GPT2, "num_labels": 1},
        ("c_attn",),
        "transformer.h.0.attn.c_attn",
        "SEQ_CLS",
        {"fan_in_fan_out": True},
    ),
    "t5": Sort("T5ForConditionalGeneration", T5, ("q", "wi"), "encoder.block.0.layer.0.SelfAttention.q"),
    "bart": Sort("BartForConditionalGeneration", BART, ("q_proj",), "model.encoder.layers.0.self_attn.q_proj"),
    "hidden": Sort("BertModel", BERT, ("key",), "encoder.layer.0.attention.self.key"),
    "two hidden": Sort("T5Model", T5, ("v",), "encoder.block.0.layer.0.SelfAttention.v"),
}


@dataclass(frozen=True, slots=True)
class Folders:
    """Where base, adapters and merged lie."""

    base: str
    adapters: tuple[str, ...]
    merged: str


def new(cls: str, sizes: dict[str, Any]) -> Any:
    """The model of a class with random weights that are not small."""
    theirs = getattr(transformers, cls)
    torch.manual_seed(1)
    model = theirs(theirs.config_class(vocab_size=WORDS, **sizes))
    randomise(model, 0.2)
    return model


def randomise(model: nn.Module, size: float, where: Callable[[str], bool] = lambda name: True) -> None:
    for name, parameter in model.named_parameters():
        if where(name):
            parameter.data.normal_(std=size)


def made(name: str, root: Path) -> Folders:
    """Base, one adapter and their merge, of a sort by name."""
    sort = SORTS[name]
    base = new(sort.cls, sort.sizes)
    base.save_pretrained(root / "base")
    with expected():
        adapter = train(base, root / "adapter", sort.targets, task_type=sort.task, **(sort.more or {}))
        merged = PeftModel.from_pretrained(load(root / "base", sort.cls), adapter).merge_and_unload()
        merged.save_pretrained(root / "merged")
    return Folders(str(root / "base"), (adapter,), str(root / "merged"))


def two(root: Path, merge: Callable[[PeftModel], PeftModel], ranks: tuple[int, int] = (3, 3)) -> Folders:
    """A Llama, two adapters that share a module, and what `merge` makes of them; they are named one and two."""
    base = new("LlamaForCausalLM", LLAMA)
    base.save_pretrained(root / "base")
    with expected():
        first = train(base, root / "first", ("q_proj", "v_proj"), r=ranks[0], lora_alpha=5)
        second = train(base, root / "second", ("q_proj", "up_proj"), r=ranks[1], lora_alpha=7)
        model = PeftModel.from_pretrained(load(root / "base", "LlamaForCausalLM"), first, adapter_name="one")
        model.load_adapter(second, adapter_name="two")
        merge(model).save_pretrained(root / "merged")
    return Folders(str(root / "base"), (first, second), str(root / "merged"))


def train(base: nn.Module, folder: Path, targets: Sequence[str], **options: Any) -> str:
    """Save an adapter over a copy of the base whose every trained tensor is random."""
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": list(targets), **options})
    tuned = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(len(str(folder.name)))
    randomise(tuned, 0.15, lambda name: "lora_" in name or "modules_to_save" in name)
    tuned.save_pretrained(folder)
    return str(folder)


def load(folder: Path | str, cls: str, **options: Any) -> Any:
    return getattr(transformers, cls).from_pretrained(folder, **options).eval()


class expected(warnings.catch_warnings):  # noqa: N801 - reads as a deed
    """What PEFT says of these by design is not told."""

    def __enter__(self) -> Any:
        found = super().__enter__()
        for category, message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        return found

"""Build tiny models, live-PEFT adapters and PEFT's own merges on disk.

Each world is one way of using PEFT.  Every trained tensor holds real random numbers: B is not zero,
magnitudes differ from the norms, biases and saved modules differ from the base, so a merge that forgets one
of them shows.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()  # a headless base is reported as a table of missing weights

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DELTA_SHARE = 0.035  # Frobenius norm of each delta over that of its base weight


# What PEFT and transformers say about these worlds by design; any other warning passes through to the caller.
EXPECTED_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (FutureWarning, r"`is_gradient_checkpointing` is deprecated"),  # PEFT 0.21 asks transformers 5.23
    (UserWarning, r"Setting `save_embedding_layers` to `True` as embedding layers found"),
    (UserWarning, r"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"),
    (UserWarning, r"Model with `tie_word_embeddings=True` and the tied_target_modules="),
    (UserWarning, r"Adapter 'default': 2 LoRA tensor\(s\) have invalid shape: .*lora_B\.bias"),  # it is 1-D
)

Kwargs = Mapping[str, Any]


@dataclass(frozen=True)
class World:
    """Name the files of one live-PEFT case."""

    name: str
    base_dir: Path
    adapter_dirs: tuple[Path, ...]
    merged: Mapping[tuple[str, bool], Path]
    kinds: Mapping[str, str]
    tied: Mapping[str, str] = field(default_factory=dict)  # tensor name -> the name it shares storage with
    base_prefix: str = ""  # what the in-memory model writes in front of every name of the base file
    tuner: str = "LORA"  # peft_type
    layers: tuple[str, ...] = ()  # kinds of layer the adapters touch, where the recipe names them


@dataclass(frozen=True)
class Recipe:
    """Say how one world is made."""

    model: Callable[[], nn.Module]
    configs: tuple[Kwargs, ...]
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    loader: type[PreTrainedModel] | None = None  # class to load the base with, where it is not the saved one
    load: Kwargs = field(default_factory=dict)  # for PeftModel.from_pretrained
    save_adapter: Kwargs = field(default_factory=dict)
    save_merged: Kwargs = field(default_factory=dict)
    base_dtype: str | None = None  # on disk, where it is not the dtype the base is loaded in
    adapter_dtype: str | None = None
    base_as_bin: bool = False
    edit_adapter: Callable[[Path, Path], None] | None = None  # (adapter folder, base folder), after PEFT wrote
    tied: Mapping[str, str] = field(default_factory=dict)
    base_prefix: str = ""


# --- models ---------------------------------------------------------------------------------------------


def _llama(**changes: Any) -> Callable[[], nn.Module]:
    """Make a two-layer llama in which no projection is square."""
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 24,
        "intermediate_size": 56,
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
    return lambda: LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def _gpt2() -> nn.Module:
    """Make a two-layer GPT-2; its attention c_proj is square."""
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 24, "n_inner": 40, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def _bert_config() -> BertConfig:
    """Size a two-layer BERT with three labels."""
    return BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=16,
        num_labels=3,
    )


class LinearStack(nn.Module):
    """Hold two linear layers, biased."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.fc0 = nn.Linear(widths[0], widths[1])
        self.act = nn.ReLU()
        self.fc1 = nn.Linear(widths[1], widths[2])


class Convs(nn.Module):
    """Hold convolutions by name, and a batch norm with its integer counter."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.bn = nn.BatchNorm1d(6)


class Embedder(nn.Module):
    """Hold an embedding and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(30, 10)
        self.head = nn.Linear(10, 17)


class Attention(nn.Module):
    """Hold a MultiheadAttention and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 5)


def _conv1d() -> nn.Module:
    return Convs(wide=nn.Conv1d(5, 7, 3), thin=nn.Conv1d(7, 6, 1))


def _conv2d() -> nn.Module:
    return Convs(wide=nn.Conv2d(5, 7, 3), tall=nn.Conv2d(7, 6, (3, 2), bias=False), one=nn.Conv2d(6, 9, 1))


def _conv3d() -> nn.Module:
    return Convs(wide=nn.Conv3d(3, 5, (2, 3, 2)), thin=nn.Conv3d(5, 4, (2, 1, 1)))


def _conv_all() -> nn.Module:
    return Convs(
        one_d=nn.Conv1d(5, 7, 3),
        two_d=nn.Conv2d(5, 7, (3, 2)),
        one_by_one=nn.Conv2d(6, 9, 1),
        three_d=nn.Conv3d(3, 5, (2, 3, 2)),
    )


# --- edits no PEFT call makes ---------------------------------------------------------------------------


def _carry_base_tensors(folder: Path, base_dir: Path) -> None:
    """Put whole base tensors into the adapter file: two that replace, one that PEFT ignores."""
    path = folder / "adapter_model.safetensors"
    base = load_file(base_dir / "model.safetensors")
    layer = "model.layers.0"
    carried = {
        f"{layer}.mlp.up_proj.weight": f"{layer}.mlp.up_proj.weight",
        f"{layer}.self_attn.q_proj.base_layer.weight": f"{layer}.self_attn.q_proj.weight",
        f"{layer}.self_attn.v_proj.weight": f"{layer}.self_attn.v_proj.weight",
    }
    state = load_file(path)
    for key, source in carried.items():
        state[f"base_model.model.{key}"] = base[source] + 0.01 * torch.randn_like(base[source])
    save_file(state, path, metadata={"format": "pt"})


def _change_both_copies(folder: Path, _base_dir: Path) -> None:
    """Make the adapter's two copies of a tied base tensor differ, from the base and from each other."""
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    for key in sorted(key for key in state if key.endswith("base_layer.weight")):
        state[key] = state[key] + 0.01 * torch.randn_like(state[key])
    save_file(state, path, metadata={"format": "pt"})


def _reverse_alpha_pattern(folder: Path, _base_dir: Path) -> None:
    """Write alpha_pattern in reverse, as a tool that does not sort may have written it."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["alpha_pattern"] = dict(reversed(config["alpha_pattern"].items()))
    path.write_text(json.dumps(config, indent=2))


# --- the table ------------------------------------------------------------------------------------------

_ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
_FP16_TOO = ("fp32", "bf16", "fp16")


def _lora(targets: list[str] | str, **changes: Any) -> dict[str, Any]:
    """Write LoraConfig arguments: r is no square number, alpha is not r."""
    return {"r": 3, "lora_alpha": 7, "lora_dropout": 0.0, "target_modules": targets, **changes}


def _one(model: Callable[[], nn.Module], config: Kwargs, **changes: Any) -> Recipe:
    """Write a recipe with a single adapter."""
    return Recipe(model=model, configs=(config,), **changes)


_QV = ["q_proj", "v_proj"]
_PATTERNS = _lora(
    _ALL_SEVEN,
    # both rank patterns match layers.0.mlp.down_proj; sorted as here, so training and reload choose alike
    rank_pattern={"down_proj": 5, r"layers\.0\.mlp\..*": 2, "model.layers.1.self_attn.q_proj": 6},
    # written unsorted: training picks v_proj, a reload picks the anchored regex, which sorts before it
    alpha_pattern={"v_proj": 11, r"^model\.layers\.1\.self_attn\.[kv]_proj": 8, "o_proj": 13},
)

RECIPES: Mapping[str, Recipe] = {
    "llama-qv": _one(_llama(), _lora(_QV), dtypes=_FP16_TOO),
    "llama-all-seven": _one(_llama(), _lora(_ALL_SEVEN)),
    "llama-tied-embed": _one(_llama(tie_word_embeddings=True), _lora(["embed_tokens", "q_proj"]), tied=_TIED),
    "llama-tied-head": _one(_llama(tie_word_embeddings=True), _lora(["lm_head", "v_proj"]), tied=_TIED),
    "llama-tied-both": _one(_llama(tie_word_embeddings=True), _lora(["embed_tokens", "lm_head"]), tied=_TIED),
    "llama-tied-carried": _one(
        _llama(tie_word_embeddings=True),
        _lora(["embed_tokens", "lm_head"]),
        tied=_TIED,
        edit_adapter=_change_both_copies,
    ),
    "llama-untied-embed-head": _one(_llama(), _lora(["embed_tokens", "lm_head", "up_proj"])),
    "llama-rslora": _one(_llama(), _lora(_QV, r=5, use_rslora=True, rank_pattern={"v_proj": 3})),
    "llama-patterns": _one(_llama(), _PATTERNS),
    "llama-patterns-unsorted": _one(_llama(), _PATTERNS, edit_adapter=_reverse_alpha_pattern),
    "llama-bias-all": _one(_llama(attention_bias=True), _lora(_QV, bias="all")),
    "llama-bias-lora-only": _one(_llama(attention_bias=True), _lora(_QV, bias="lora_only")),
    # saved in fp32 next to a half base: a plain load casts it to the base's dtype
    "llama-saved-head": _one(_llama(), _lora(_QV, modules_to_save=["lm_head"]), dtypes=_FP16_TOO, adapter_dtype="fp32"),
    "llama-saved-norm-and-embed": _one(_llama(), _lora(_QV, modules_to_save=["norm", "embed_tokens"])),
    "llama-trainable-tokens": _one(_llama(), _lora(_QV, trainable_token_indices={"embed_tokens": [2, 7, 31]})),
    "llama-tied-trainable-tokens": _one(
        _llama(tie_word_embeddings=True), _lora(_QV, trainable_token_indices=[2, 7, 31]), tied=_TIED
    ),
    "llama-dora": _one(_llama(), _lora(["q_proj", "o_proj", "up_proj"], use_dora=True)),
    "llama-two-adapters": Recipe(
        model=_llama(), configs=(_lora(_QV), _lora(["q_proj", "up_proj"], r=6, lora_alpha=10))
    ),
    "gpt2": _one(_gpt2, _lora(["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2-dora": _one(_gpt2, _lora(["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True)),
    "bert-classifier": _one(
        lambda: BertForSequenceClassification(_bert_config()),
        _lora(r".*layer\.\d+\.(intermediate|output)\.dense", task_type="SEQ_CLS", bias="none"),
    ),
    "bert-headless-base": _one(
        lambda: BertModel(_bert_config()),
        _lora(["intermediate.dense", "query"], task_type="SEQ_CLS"),
        loader=BertForSequenceClassification,
        base_prefix="bert.",
    ),
    "linear-bias-lora": _one(lambda: LinearStack(14, 20, 11), _lora(["fc0", "fc1"], lora_bias=True), dtypes=_FP16_TOO),
    "conv1d": _one(_conv1d, _lora(["wide", "thin"])),
    "conv2d": _one(_conv2d, _lora(["wide", "tall", "one"])),
    "conv3d": _one(_conv3d, _lora(["wide", "thin"])),
    "conv-dora": _one(_conv_all, _lora(["one_d", "two_d", "one_by_one", "three_d"], use_dora=True)),
    "embedding": _one(Embedder, _lora(["emb"])),
    "embedding-dora": _one(Embedder, _lora(["emb", "head"], use_dora=True)),
    "mha": _one(Attention, _lora(["mha"], alpha_pattern={"mha": 11})),
    "square": _one(lambda: LinearStack(16, 16, 16), _lora(["fc0", "fc1"])),
    "adapter-bf16": _one(_llama(), _lora(_QV), adapter_dtype="bf16"),
    "adapter-bin": _one(_llama(), _lora(_QV), save_adapter={"safe_serialization": False}),
    "sharded": _one(_llama(), _lora(_QV), base_as_bin=True, save_merged={"max_shard_size": "20KB"}),
    "fp16-base": _one(_llama(), _lora(_ALL_SEVEN), dtypes=("fp16",)),
    # and a low-memory load does not, so one tensor of the merged file is wider than the rest
    "low-cpu-mem": _one(
        _llama(),
        _lora(_QV, modules_to_save=["lm_head"]),
        load={"low_cpu_mem_usage": True},
        dtypes=_FP16_TOO,
        adapter_dtype="fp32",
    ),
    "no-autocast": _one(_llama(), _lora(_QV), load={"autocast_adapter_dtype": False}, dtypes=_FP16_TOO),
    "cast-base": _one(_llama(), _lora(_QV), base_dtype="fp32", dtypes=("bf16", "fp16")),
    "carried-base": _one(_llama(), _lora(_QV), edit_adapter=_carry_base_tensors),
}


def names() -> list[str]:
    """List every world."""
    return list(RECIPES)


def cases() -> list[tuple[str, str, bool]]:
    """List every (world, dtype, safe) there is."""
    return [
        (name, dtype, safe) for name, recipe in RECIPES.items() for dtype in recipe.dtypes for safe in (False, True)
    ]


# --- building -------------------------------------------------------------------------------------------


def build(name: str, root: Path, dtype: str, safe: bool) -> World:
    """Build one world below root, keeping the base and adapter that an earlier call left there."""
    with warnings.catch_warnings():
        for category, message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        return _build(name, root, dtype, safe)


def _build(name: str, root: Path, dtype: str, safe: bool) -> World:
    """Build one world of this table, warnings and all."""
    return make(name, RECIPES[name], root, dtype, safe, _save_adapter)


def make(name: str, recipe: Recipe, root: Path, dtype: str, safe: bool, save_adapter: Callable[..., None]) -> World:
    """Build the world of one recipe; save_adapter takes what `_save_adapter` takes."""
    if dtype not in recipe.dtypes:
        raise ValueError(f"{name} is not built in {dtype}, only in {', '.join(recipe.dtypes)}")
    home = Path(root) / f"{name}-{dtype}"
    base_dir = home / "base"
    adapter_dirs = tuple(home / f"adapter{i}" for i in range(len(recipe.configs)))
    if not base_dir.exists():
        _save_base(recipe, base_dir, recipe.base_dtype or dtype, _seed(name))
        for i, adapter_dir in enumerate(adapter_dirs):
            save_adapter(recipe, i, base_dir, adapter_dir, dtype, _seed(name) + 1 + i)
    merged_dir = home / ("merged-safe" if safe else "merged")
    if not merged_dir.exists():
        _save_merged(recipe, base_dir, adapter_dirs, merged_dir, dtype, safe)
    found = {(dtype, flag): home / leaf for flag, leaf in ((False, "merged"), (True, "merged-safe"))}
    return World(
        name=name,
        base_dir=base_dir,
        adapter_dirs=adapter_dirs,
        merged={key: path for key, path in found.items() if path.exists()},
        kinds=_kinds(_load_base(recipe, base_dir, dtype)),
        tied=recipe.tied,
        base_prefix=recipe.base_prefix,
    )


def _seed(name: str) -> int:
    """Turn a world's name into a seed that no run changes."""
    return zlib.crc32(name.encode()) % 2**31


def _save_base(recipe: Recipe, base_dir: Path, dtype: str, seed: int) -> None:
    """Write a base in which no tensor is constant."""
    torch.manual_seed(seed)
    model = recipe.model()
    for name, parameter in model.named_parameters():
        _randomise(name, parameter)
    if not isinstance(model, PreTrainedModel):
        _randomise_buffers(model)
    model.to(DTYPES[dtype])
    if not isinstance(model, PreTrainedModel):
        _save_plain(model, base_dir)
    elif recipe.base_as_bin:
        _save_bin_shards(model, base_dir)
    else:
        model.save_pretrained(base_dir)


def _randomise(name: str, parameter: nn.Parameter) -> None:
    """Fill one base tensor: norms near 1, everything else near 0."""
    noise = torch.randn_like(parameter)
    is_norm = parameter.ndim == 1 and name.endswith("weight")
    parameter.data.copy_(1 + 0.1 * noise if is_norm else 0.05 * noise)


def _randomise_buffers(model: nn.Module) -> None:
    """Give running statistics and counters values that no fresh module has."""
    for buffer in model.buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5 if buffer.is_floating_point() else torch.tensor(7))


def _save_plain(model: nn.Module, folder: Path) -> None:
    """Write a plain module's state under the names the module has."""
    folder.mkdir(parents=True)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "custom", "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _save_bin_shards(model: PreTrainedModel, folder: Path) -> None:
    """Write the base as two pickled shards and an index, as older tools did."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    state = model.state_dict()
    keys = list(state)
    halves = {
        "pytorch_model-00001-of-00002.bin": keys[: len(keys) // 2],
        "pytorch_model-00002-of-00002.bin": keys[len(keys) // 2 :],
    }
    for file, part in halves.items():
        torch.save({key: state[key].clone() for key in part}, folder / file)
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in state.values())},
        "weight_map": {key: file for file, part in halves.items() for key in part},
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2))


def _load_base(recipe: Recipe, base_dir: Path, dtype: str) -> nn.Module:
    """Load the base the way a user would, in the dtype asked for."""
    torch.manual_seed(0)
    model = recipe.model()
    if isinstance(model, PreTrainedModel):
        return (recipe.loader or type(model)).from_pretrained(base_dir, dtype=DTYPES[dtype])
    model.to(DTYPES[dtype])
    model.load_state_dict(load_file(base_dir / "model.safetensors"))
    return model


def _save_adapter(recipe: Recipe, number: int, base_dir: Path, folder: Path, dtype: str, seed: int) -> None:
    """Train an adapter by hand, every tensor of it, and let PEFT write it."""
    model = _load_base(recipe, base_dir, dtype)
    torch.manual_seed(seed)
    tuned = get_peft_model(model, LoraConfig(**recipe.configs[number]))
    _perturb(tuned)
    if recipe.adapter_dtype:
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[recipe.adapter_dtype])
    tuned.save_pretrained(folder, **recipe.save_adapter)
    if recipe.edit_adapter:
        recipe.edit_adapter(folder, base_dir)


def _perturb(tuned: PeftModel) -> None:
    """Change every trained tensor."""
    for name, parameter in tuned.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn_like(parameter)
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(1 + 0.1 * noise.clamp(-2, 2))
        elif "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
            parameter.data.copy_(0.1 * noise)
        else:
            parameter.data.add_(0.02 * noise)
    for module in tuned.modules():
        if isinstance(module, LoraLayer):
            _scale_delta(module)


def _scale_delta(layer: LoraLayer, adapter: str = "default") -> None:
    """Scale B until the delta is DELTA_SHARE of the weight it is added to."""
    base = layer.get_base_layer()
    weight = getattr(base, "in_proj_weight", None)
    weight = base.weight if weight is None else weight
    wanted = DELTA_SHARE * weight.float().norm() / layer.get_delta_weight(adapter).float().norm()
    if adapter in layer.lora_embedding_B:
        layer.lora_embedding_B[adapter].data.mul_(wanted)
    else:
        layer.lora_B[adapter].weight.data.mul_(wanted)


def _save_merged(
    recipe: Recipe, base_dir: Path, adapter_dirs: tuple[Path, ...], folder: Path, dtype: str, safe: bool
) -> None:
    """Merge with PEFT and write the result as its class writes it."""
    model = _load_base(recipe, base_dir, dtype)
    labels = [f"adapter{i}" for i in range(len(adapter_dirs))]
    tuned = PeftModel.from_pretrained(model, adapter_dirs[0], adapter_name=labels[0], **recipe.load)
    for label, adapter_dir in zip(labels[1:], adapter_dirs[1:], strict=True):
        tuned.load_adapter(adapter_dir, adapter_name=label, **recipe.load)
    merged = tuned.merge_and_unload(safe_merge=safe, adapter_names=labels)
    if isinstance(merged, PreTrainedModel):
        merged.save_pretrained(folder, **recipe.save_merged)
    else:
        _save_plain(merged, folder)


def _kinds(model: nn.Module) -> dict[str, str]:
    """Say for each module which formula its delta has."""
    convs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    table: tuple[tuple[Any, str], ...] = (
        (nn.MultiheadAttention, "mha"),
        (Conv1D, "conv1d_t"),
        (nn.Embedding, "embedding"),
        (convs, "conv"),
        (nn.Linear, "linear"),
    )
    kinds: dict[str, str] = {}
    for path, module in model.named_modules():
        kind = next((kind for types, kind in table if isinstance(module, types)), None)
        if kind and kinds.get(path.rpartition(".")[0]) != "mha":
            kinds[path] = kind
    return kinds

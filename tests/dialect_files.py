"""Write tiny adapters exactly as other tools write them, and the deltas that those tools add, in plain torch.

A scene is a base, an adapter in one tool's names, and for each weight it touches the product of the factors as that
tool computes it, with the alpha and r that make its scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

HEADS, GROUPS, WIDTH, INNER, HEAD = 4, 2, 24, 40, 6
LLAMA = {
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "hidden_size": WIDTH,
    "head_dim": HEAD,
    "num_hidden_layers": 2,
}
PROJECTIONS = {
    "self_attn.q_proj": (HEADS * HEAD, WIDTH),
    "self_attn.k_proj": (GROUPS * HEAD, WIDTH),
    "self_attn.v_proj": (GROUPS * HEAD, WIDTH),
    "self_attn.o_proj": (WIDTH, HEADS * HEAD),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
UNET = {
    "conv_in": (8, 4, 3, 3),
    "down_blocks.0.attentions.0.proj_in": (12, 8, 1, 1),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (12, 12),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (12, 20),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (12, 12),
    "down_blocks.0.resnets.1.conv1": (10, 6, 3, 3),
    "mid_block.resnets.1.conv2": (10, 8, 3, 3),
    "up_blocks.1.attentions.2.proj_out": (12, 10),
    "up_blocks.0.upsamplers.0.conv": (9, 7, 3, 3),
}
TEXT = {"text_model.encoder.layers.0.self_attn.q_proj": (14, 10), "text_model.encoder.layers.0.mlp.fc1": (18, 10)}


@dataclass(frozen=True)
class Touched:
    """One weight: the product that the tool adds, times alpha / r."""

    product: Tensor
    alpha: float
    rank: int

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Scene:
    """The files of one case; `write` lays them on disk."""

    dialect: str
    base: Mapping[str, Tensor]
    adapter: Mapping[str, Tensor]
    touched: Mapping[str, Touched]
    config: Mapping[str, Any] = field(default_factory=dict)  # of the base
    told: Mapping[str, Any] | None = None  # adapter_config.json
    metadata: Mapping[str, str] = field(default_factory=dict)
    file: str = "adapter.safetensors"
    replaced: Mapping[str, Tensor] = field(default_factory=dict)  # base tensors that the adapter brings

    def merged(self, scale: Callable[[Touched], float] = lambda one: one.scale) -> dict[str, Tensor]:
        """Every touched weight plus its scaled product, in float32."""
        found = {**self.base, **self.replaced}
        for name, one in self.touched.items():
            found[name] = found[name] + scale(one) * one.product.reshape(found[name].shape)
        return found

    def write(self, root: Path, merged: Mapping[str, Tensor] | None = None) -> tuple[Path, Path, Path]:
        """Base folder, adapter file, merged folder."""
        adapter = root / "adapter" / self.file
        adapter.parent.mkdir(parents=True)
        WRITERS[adapter.suffix](self, adapter)
        if self.told is not None:
            (adapter.parent / "adapter_config.json").write_text(json.dumps(self.told))
        for place, tensors in (("base", self.base), ("merged", self.merged() if merged is None else merged)):
            (root / place).mkdir()
            (root / place / "config.json").write_text(json.dumps(self.config))
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, root / place / "model.safetensors")
        return root / "base", adapter, root / "merged"


def _safetensors(scene: Scene, path: Path) -> None:
    save_file({k: v.contiguous() for k, v in scene.adapter.items()}, path, metadata={"format": "pt", **scene.metadata})


def _pickle(scene: Scene, path: Path) -> None:
    torch.save(dict(scene.adapter), path)


def _npz(scene: Scene, path: Path) -> None:
    np.savez(path, **{name: tensor.numpy() for name, tensor in scene.adapter.items()})


def _gguf(scene: Scene, path: Path) -> None:
    writer = gguf.GGUFWriter(path, scene.metadata["general.architecture"])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(scene.metadata["alpha"]))
    for name, tensor in scene.adapter.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


WRITERS: Mapping[str, Callable[[Scene, Path], None]] = {
    ".safetensors": _safetensors,
    ".pt": _pickle,
    ".npz": _npz,
    ".gguf": _gguf,
}


def random(*shape: int, std: float = 0.1) -> Tensor:
    return std * torch.randn(shape)


def weights(shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{name}.weight": random(*shape, std=0.3) for name, shape in shapes.items()}


def llama(layers: int = 2) -> dict[str, Tensor]:
    """A Llama in the names of transformers; a norm is a bystander."""
    names = {f"layers.{n}.{name}": shape for n in range(layers) for name, shape in PROJECTIONS.items()}
    return weights(names, "model.") | {"model.norm.weight": 1 + random(WIDTH)}


def factors(shape: tuple[int, ...], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and their product over a weight (out, in, k...), as `mm` and as a convolution of the one with the other."""
    outputs, *inner = shape
    a, b = random(rank, *inner), random(outputs, rank, *(1 for _ in inner[1:]))
    product = (b.flatten(1) @ a.flatten(1)).reshape(shape)
    return a, b, product


# ------------------------------------------------------------------------------------------ kohya and diffusers


def kohya(*, alphas: bool = True) -> Scene:
    """sd-scripts: U-Net and text encoder of one pipeline file, r and alpha of their own in each module."""
    base = weights(UNET, "unet.") | weights(TEXT, "text_encoder.") | {"unet.norm.bias": random(7)}
    adapter, touched = {}, {}
    for index, name in enumerate([*(f"unet.{one}" for one in UNET), *(f"text_encoder.{one}" for one in TEXT)]):
        part, _, module = name.partition(".")
        rank, alpha = 2 + index % 3, 1.5 + index % 4
        a, b, product = factors(base[f"{name}.weight"].shape, rank)
        key = f"lora_{'unet' if part == 'unet' else 'te'}_{module.replace('.', '_')}"
        if name.endswith("proj_out"):  # a 1x1 convolution when it was trained
            a, b = a[:, :, None, None], b[:, :, None, None]
        adapter |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        adapter |= {f"{key}.alpha": torch.tensor(alpha)} if alphas else {}
        touched[f"{name}.weight"] = Touched(product, alpha if alphas else rank, rank)
    return Scene(
        "kohya", base, adapter, touched, metadata={"ss_network_module": "networks.lora", "ss_network_alpha": "1"}
    )


CHECKPOINT_NAMES = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.attentions.0.proj_in": "input_blocks.1.1.proj_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (
        "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0"
    ),
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.1.attentions.2.proj_out": "output_blocks.5.1.proj_out",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
}


def kohya_single_file() -> Scene:
    """The same over a base in the names of CompVis, as sd-scripts merges it."""
    scene = kohya()

    def name(one: str) -> str:
        """The name in the single file."""
        part, _, module = one.removesuffix(".weight").partition(".")
        if part == "text_encoder":
            return f"cond_stage_model.transformer.{module}.weight"
        return f"model.diffusion_model.{CHECKPOINT_NAMES.get(module, module)}.weight"

    return replace(
        scene,
        base={name(one): tensor for one, tensor in scene.base.items()},
        touched={name(one): value for one, value in scene.touched.items()},
    )


def loha() -> Scene:
    """LyCORIS LoHa on a matrix and on a convolution with cores."""
    base = weights({"net.wide": (10, 14), "net.conv": (6, 5, 3, 3)}, "unet.")
    adapter, touched = {}, {}
    w1a, w1b, w2a, w2b = random(10, 3), random(3, 14), random(10, 3), random(3, 14)
    key = "lora_unet_net_wide"
    adapter |= {f"{key}.hada_w1_a": w1a, f"{key}.hada_w1_b": w1b, f"{key}.hada_w2_a": w2a, f"{key}.hada_w2_b": w2b}
    touched["unet.net.wide.weight"] = Touched((w1a @ w1b) * (w2a @ w2b) * 30, 5.0, 3)
    adapter[f"{key}.hada_w1_a"] = w1a * 30
    t1, t2 = random(2, 2, 3, 3, std=1), random(2, 2, 3, 3, std=1)
    w1a, w1b, w2a, w2b = random(2, 6, std=1), random(2, 5), random(2, 6), random(2, 5, std=1)
    halves = [torch.einsum("ijkl,jr,ip->prkl", *one) for one in ((t1, w1b, w1a), (t2, w2b, w2a))]
    key = "lora_unet_net_conv"
    adapter |= {f"{key}.hada_w1_a": w1a, f"{key}.hada_w1_b": w1b, f"{key}.hada_w2_a": w2a, f"{key}.hada_w2_b": w2b}
    adapter |= {f"{key}.hada_t1": t1, f"{key}.hada_t2": t2}
    touched["unet.net.conv.weight"] = Touched(halves[0] * halves[1], 3.0, 2)
    adapter |= {"lora_unet_net_wide.alpha": torch.tensor(5.0), "lora_unet_net_conv.alpha": torch.tensor(3.0)}
    return Scene("kohya", base, adapter, touched)


def lokr() -> Scene:
    """LyCORIS LoKr: one half in factors, both halves whole (the alpha is then without effect), a convolution."""
    base = weights({"net.first": (10, 12), "net.whole": (6, 12), "net.lying": (8, 6, 3, 3)}, "unet.")
    w1, w2a, w2b = random(2, 3, std=1), random(5, 3), random(3, 4, std=1)
    v1, v2 = random(2, 3, std=1), random(3, 4)
    u1, u2 = random(2, 3, std=1), random(4, 2, 3, 3)
    one, two, three = (f"lora_unet_net_{name}" for name in ("first", "whole", "lying"))
    adapter = {
        f"{one}.lokr_w1": w1,
        f"{one}.lokr_w2_a": w2a,
        f"{one}.lokr_w2_b": w2b,
        f"{one}.alpha": torch.tensor(7.0),
    }
    adapter |= {f"{two}.lokr_w1": v1, f"{two}.lokr_w2": v2, f"{two}.alpha": torch.tensor(9.0)}
    adapter |= {f"{three}.lokr_w1": u1, f"{three}.lokr_w2": u2, f"{three}.alpha": torch.tensor(9.0)}
    touched = {
        "unet.net.first.weight": Touched(torch.kron(w1, w2a @ w2b), 7.0, 3),
        "unet.net.whole.weight": Touched(torch.kron(v1, v2), 1.0, 1),
        "unet.net.lying.weight": Touched(torch.kron(u1[:, :, None, None], u2), 1.0, 1),
    }
    return Scene("kohya", base, adapter, touched)


def diffusers(style: str) -> Scene:
    """pytorch_lora_weights.safetensors in one of its styles."""
    base = weights(UNET, "unet.") | weights(TEXT, "text_encoder.")
    names = [name.removesuffix(".weight") for name in base]
    if style in ("processors", "lora.down"):
        names = [name for name in names if base[f"{name}.weight"].ndim == 2 and not name.endswith("proj_out")]
    if style == "processors":
        names = [name for name in names if name.startswith("unet.") or name.endswith("q_proj")]
    ranks = dict.fromkeys(names, 3)
    alphas = {name: float(ranks[name]) for name in names}
    adapter, touched = {}, {}
    if style in ("alpha", "metadata"):
        ranks = {name: 2 + index % 3 for index, name in enumerate(names)}
        alphas = {name: 1.5 + index % 4 for index, name in enumerate(names)}
    for name in names:
        a, b, product = factors(base[f"{name}.weight"].shape, ranks[name])
        adapter |= _in_style(style, name, a, b)
        adapter |= {f"{name}.alpha": torch.tensor(alphas[name])} if style == "alpha" else {}
        touched[f"{name}.weight"] = Touched(product, alphas[name], ranks[name])
    metadata = {"lora_adapter_metadata": json.dumps(_lora_configs(ranks, alphas))} if style == "metadata" else {}
    return Scene("diffusers", base, adapter, touched, metadata=metadata, file="pytorch_lora_weights.safetensors")


def _in_style(style: str, name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    if style == "lora.down":
        layer = "lora_linear_layer" if name.startswith("text_encoder") else "lora"
        return {f"{name}.{layer}.down.weight": a, f"{name}.{layer}.up.weight": b}
    if style == "processors":
        head, _, leaf = name.replace(".to_out.0", ".to_out").replace(".q_proj", ".to_q").rpartition(".")
        head = f"{head.removeprefix('unet.')}.processor" if name.startswith("unet.") else head
        return {f"{head}.{leaf}_lora.down.weight": a, f"{head}.{leaf}_lora.up.weight": b}
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def _lora_configs(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """A LoraConfig for each part, everything in its patterns."""
    found: dict[str, Any] = {}
    for part in ("unet", "text_encoder"):
        inner = {name.removeprefix(f"{part}."): name for name in ranks if name.startswith(f"{part}.")}
        found |= {f"{part}.peft_type": "LORA", f"{part}.r": 9, f"{part}.lora_alpha": 1, f"{part}.use_rslora": False}
        found[f"{part}.rank_pattern"] = {path: ranks[name] for path, name in inner.items()}
        found[f"{part}.alpha_pattern"] = {path: alphas[name] for path, name in inner.items()}
    return found


# ------------------------------------------------------------------------------------------------------ mlx-lm


def mlx(file: str = "adapters.safetensors") -> Scene:
    """mlx-lm: factors the other way round, scale as it is; an embedding too."""
    base, rank, scale = llama() | {"model.embed_tokens.weight": random(50, WIDTH, std=0.3)}, 3, 2.7
    adapter, touched = {}, {}
    for module in [f"model.layers.1.{name}" for name in PROJECTIONS] + ["model.embed_tokens"]:
        outputs, inputs = base[f"{module}.weight"].shape
        embeds = module.endswith("embed_tokens")
        a, b = random(outputs if embeds else inputs, rank), random(rank, inputs if embeds else outputs)
        adapter |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        touched[f"{module}.weight"] = Touched(a @ b if embeds else b.T @ a.T, scale * rank, rank)
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    told = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters, "model": "org/base", "iters": 100}
    return Scene("mlx", base, adapter, touched, LLAMA, told, file=file)


def mlx_experts(*, stacked: bool, flat: bool) -> Scene:
    """mlx-lm's experts, over a base that stacks them or keeps each apart; `flat`: A as older releases keep it."""
    experts, rank, scale = 4, 3, 3.5
    shapes = {"gate_proj": (14, 10), "down_proj": (10, 14)}
    base: dict[str, Tensor] = {"model.norm.weight": random(10)}
    adapter: dict[str, Tensor] = {}
    touched = {}
    for name, (outputs, inputs) in shapes.items():
        own, path = {"gate_proj": "w1", "down_proj": "w2"}[name], "model.layers.0.block_sparse_moe"
        a, b = random(experts, rank, inputs), random(experts, outputs, rank)
        adapter |= {f"{path}.switch_mlp.{name}.lora_a": a.reshape(-1, inputs) if flat else a}
        adapter |= {f"{path}.switch_mlp.{name}.lora_b": b}
        if stacked:
            base[f"{path}.switch_mlp.{name}.weight"] = random(experts, outputs, inputs, std=0.3)
            touched[f"{path}.switch_mlp.{name}.weight"] = Touched(b @ a, scale * rank, rank)
            continue
        for index in range(experts):
            base[f"{path}.experts.{index}.{own}.weight"] = random(outputs, inputs, std=0.3)
            touched[f"{path}.experts.{index}.{own}.weight"] = Touched(b[index] @ a[index], scale * rank, rank)
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": ["block_sparse_moe.switch_mlp.gate_proj"]}
    told = {"num_layers": 1, "lora_parameters": parameters}
    return Scene("mlx", base, adapter, touched, {"model_type": "mixtral"}, told, file="adapters.safetensors")


# ---------------------------------------------------------------------------------------- torchtune and llama.cpp

TORCHTUNE = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
META = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def to_neighbours(rows: Tensor, heads: int) -> Tensor:
    """transformers -> torchtune, Meta and llama.cpp: the permutation of their own converters."""
    half = rows.shape[0] // heads // 2
    return rows.view(heads, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def heads_of(name: str) -> int:
    return {"self_attn.q_proj": HEADS, "self_attn.k_proj": GROUPS}.get(name, 0)


def torchtune(names: str = "transformers", model_type: str = "llama") -> Scene:
    """torchtune's own adapter file over a base in transformers', Meta's or its own names."""
    rank, alpha, rotated = 4, 6.0, model_type == "llama"
    theirs, adapter, touched = llama(), {}, {}
    base = {}
    for n in range(2):
        for name, shape in PROJECTIONS.items():
            a, b, product = factors(shape, rank)
            heads = heads_of(name) if rotated else 0
            ours = f"layers.{n}.{TORCHTUNE[name]}"
            adapter |= {f"{ours}.lora_a.weight": a, f"{ours}.lora_b.weight": to_neighbours(b, heads) if heads else b}
            weight = theirs[f"model.layers.{n}.{name}.weight"]
            if names != "transformers" and heads:
                weight, product = to_neighbours(weight, heads), to_neighbours(product, heads)
            own = {"transformers": f"model.layers.{n}.{name}", "torchtune": ours, "meta": f"layers.{n}.{META[name]}"}
            base[f"{own[names]}.weight"] = weight
            touched[f"{own[names]}.weight"] = Touched(product, alpha, rank)
    told = {"r": rank, "lora_alpha": alpha, "target_modules": ["q_proj", "o_proj"], "peft_type": "LORA"}
    config = {**LLAMA, "model_type": model_type} if names == "transformers" else {}
    return Scene("torchtune", base, adapter, touched, config, told, file="adapter_0.pt")


GGUF = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "embed_tokens": "token_embd",
}


def gguf_name(name: str) -> str:
    """The name in a GGUF model of a weight that the scene touches."""
    parts = name.split(".")
    leaf = GGUF[parts[-2]]
    return f"blk.{parts[2]}.{leaf}.weight" if parts[1] == "layers" else f"{leaf}.weight"


def write_gguf_model(path: Path, tensors: Mapping[str, Tensor], architecture: str) -> Path:
    """A model in GGUF, float32, in the names of `tensors`; rows as they are given."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (("head_count", HEADS), ("head_count_kv", GROUPS)):
        writer.add_uint32(f"{architecture}.attention.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def llama_cpp(alpha: float = 7.0, architecture: str = "llama") -> Scene:
    """What convert_lora_to_gguf.py writes, over a base in the names of transformers."""
    rank, adapter, touched, base = 3, {}, {}, {}
    theirs = llama()
    for n in range(2):
        for name, shape in PROJECTIONS.items():
            a, b, product = factors(shape, rank)
            heads = heads_of(name) if architecture == "llama" else 0
            key = gguf_name(f"model.layers.{n}.{name}.weight")
            adapter |= {f"{key}.lora_a": a, f"{key}.lora_b": to_neighbours(b, heads) if heads else b}
            own = f"model.layers.{n}.{name}.weight"
            touched[own], base[own] = Touched(product, alpha or rank, rank), theirs[own]
    table, a, b = random(50, WIDTH, std=0.3), random(rank, 50), random(WIDTH, rank)
    adapter |= {"token_embd.weight.lora_a": a.T, "token_embd.weight.lora_b": b}
    base["model.embed_tokens.weight"] = table
    touched["model.embed_tokens.weight"] = Touched((b @ a).T, alpha or rank, rank)
    metadata = {"general.architecture": architecture, "alpha": str(alpha)}
    config = {**LLAMA, "model_type": architecture, "tie_word_embeddings": False}
    return Scene("llama.cpp", base, adapter, touched, config, metadata=metadata, file="adapter.gguf")


# --------------------------------------------------------------------------------------- loralib, DeepSpeed-Chat


def loralib(*, whole: bool = False, in_out: bool = False) -> Scene:
    """loralib's parameters beside the weights; `whole`: in a state dict of the model, its own weights moved too."""
    rank, alpha = 3, 8.0
    base = {
        "h.0.mlp.weight": random(18, 10, std=0.3),
        "wte.weight": random(30, 10, std=0.3),
        "h.0.ln.weight": random(10),
    }
    a, b = random(rank, 10), random(18, rank)
    ea, eb = random(rank, 30), random(10, rank)
    adapter = {"h.0.mlp.lora_A": a, "h.0.mlp.lora_B": b, "wte.lora_A": ea, "wte.lora_B": eb}
    touched = {"h.0.mlp.weight": Touched(b @ a, alpha, rank), "wte.weight": Touched((eb @ ea).T, alpha, rank)}
    replaced = {name: tensor + random(*tensor.shape) for name, tensor in base.items()} if whole else {}
    if in_out:
        base["h.0.mlp.weight"] = base["h.0.mlp.weight"].T.contiguous()
        touched["h.0.mlp.weight"] = Touched((b @ a).T, alpha, rank)
    told = {"r": rank, "lora_alpha": alpha}
    return Scene("loralib", base, adapter | replaced, touched, {}, told, file="lora.pt", replaced=replaced)


def merged_linear(enabled: tuple[bool, ...], *, in_out: bool, peft: bool = False) -> Scene:
    """Query, key and value in one layer, the enabled ones with a LoRA; a plain LoRA beside it."""
    width, rank, alpha, count = 8, 3, 5.0, sum(enabled)
    a, b = random(rank * count, width), random(width * count, rank)
    product = torch.zeros(width * len(enabled), width)
    groups = iter(zip(a.split(rank), b.split(width), strict=True))
    for place, flag in enumerate(enabled):
        if flag:
            ga, gb = next(groups)
            product[place * width : (place + 1) * width] = gb @ ga
    pa, pb, plain = factors((width, width), rank)
    base = {
        "h.0.c_attn.weight": random(width * len(enabled), width, std=0.3),
        "h.0.c_proj.weight": random(width, width),
    }
    touched = {"h.0.c_attn.weight": Touched(product, alpha, rank), "h.0.c_proj.weight": Touched(plain, alpha, rank)}
    if in_out:
        base = {name: tensor.T.contiguous() for name, tensor in base.items()}
        touched = {name: replace(one, product=one.product.T) for name, one in touched.items()}
    told: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "enable_lora": list(enabled), "fan_in_fan_out": in_out}
    adapter = {"h.0.c_attn.lora_A": a, "h.0.c_attn.lora_B": b, "h.0.c_proj.lora_A": pa, "h.0.c_proj.lora_B": pb}
    if peft:
        adapter = {f"base_model.model.{name}.weight": tensor for name, tensor in adapter.items()}
        adapter["base_model.model.h.0.c_attn.lora_B.weight"] = b[:, :, None]
        told |= {"peft_type": "LORA", "merge_weights": False, "bias": "none"}
    return Scene("merged-linear" if peft else "loralib", base, adapter, touched, {}, told)


def decomposed(scene: Scene) -> tuple[Scene, dict[str, Tensor]]:
    """The same with magnitudes (DoRA), and the merge: m / |W + s P| (W + s P), norms over the inputs."""
    moved, adapter = scene.merged(), dict(scene.adapter)
    keys = {name.removesuffix(".weight"): name for name in scene.touched}
    for key, name in keys.items():
        norms = torch.linalg.norm(moved[name], dim=1)
        magnitude = norms * (1 + random(norms.shape[0]))
        moved[name] = (magnitude / norms)[:, None] * moved[name]
        adapter[f"{key}.{'m' if scene.dialect == 'mlx' else 'magnitude'}"] = magnitude
    return replace(scene, adapter=adapter), moved


def deepspeed(*, swapped: bool = False, whole: bool = False) -> Scene:
    """LinearLayer_LoRA; `swapped`: the two names the other way round, as derived code has them."""
    rank, scaling = 3, 2.0
    shapes = {"model.decoder.layers.0.fc1": (18, 10), "model.decoder.layers.0.self_attn.q_proj": (12, 12)}
    base = weights(shapes) | {"model.decoder.final_layer_norm.weight": random(12)}
    adapter, touched = {}, {}
    for name, (outputs, inputs) in shapes.items():
        first, then = random(inputs, rank), random(rank, outputs)
        one, two = ("left", "right") if swapped else ("right", "left")
        adapter |= {f"{name}.lora_{one}_weight": first, f"{name}.lora_{two}_weight": then}
        touched[f"{name}.weight"] = Touched(torch.matmul(then.t(), first.t()), scaling, rank)
    replaced = {name: tensor + random(*tensor.shape) for name, tensor in base.items()} if whole else {}
    told = {"lora_scaling": scaling, "lora_dim": rank}
    return Scene("deepspeed-chat", base, adapter | replaced, touched, {}, told, file="actor.pt", replaced=replaced)

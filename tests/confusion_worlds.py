"""Models of a realistic size for the confusion matrix: base, adapters, an honest merge; whole tensors in plain torch.

Each model has about eight targets of two ranks, square ones and others, as users have them: a finding is judged, and
not a tensor. Nothing here is shared with the code that judges.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SIZES = (1e-1, 1e-2, 1e-3, 1e-4)
PREFIX = "base_model.model."
HEADS: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 320,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 32,
    "num_hidden_layers": 2,
}

# --------------------------------------------------------------------------------------------------------- nouns


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The ingredients of s, those of this module and those of the configuration's head."""

    alpha: float
    rank: int
    rslora: bool = False
    usual_alpha: float
    usual_rank: int
    weight: float = 1.0

    @property
    def bare(self) -> float:
        """alpha / r, or alpha / sqrt(r)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def value(self) -> float:
        """The same, times the weight that --weights gives the adapter."""
        return self.weight * self.bare


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one adapter does to one target.

    a, b     factors of a low-rank product          m   DoRA's magnitude
    made     the unscaled delta of another tuner    turn   what a multiplicative tuner does to the weight
    window   the only rows that it touches          adapter   counted from 0
    """

    scale: Scale
    a: Tensor | None = None
    b: Tensor | None = None
    m: Tensor | None = None
    made: Tensor | None = None
    turn: Callable[[Tensor], Tensor] | None = None
    window: slice | None = None
    adapter: int = 0


@dataclass(frozen=True, kw_only=True)
class Target:
    """A base tensor and what the adapters do to it, in their order.

    saved          what it is replaced by         tokens, rows   which rows are replaced, and by what
    """

    name: str
    kind: str
    base: Tensor
    pieces: tuple[Piece, ...] = ()
    saved: Tensor | None = None
    tokens: tuple[int, ...] = ()
    rows: Tensor | None = None

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def family(self) -> str:
        return self.module.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A base model with its adapters, and the folders that they lie in."""

    world: str
    targets: tuple[Target, ...]
    bystanders: Mapping[str, Tensor]
    adapters: tuple[tuple[Mapping[str, Any], Mapping[str, Tensor]], ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None

    def target(self, name: str) -> Target | None:
        """The target of that name, if there is one."""
        return next((one for one in self.targets if one.name == name), None)

    def save(self, root: Path) -> tuple[Path, list[Path]]:
        """Write base and adapters as their tools do."""
        base = root / "base"
        base.mkdir(parents=True)
        tensors = {one.name: one.base for one in self.targets} | dict(self.bystanders)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, base / "model.safetensors")
        (base / "config.json").write_text(json.dumps(dict(self.config)))
        folders = []
        for index, (config, factors) in enumerate(self.adapters):
            folders.append(root / f"adapter-{index}")
            folders[-1].mkdir()
            save_file({k: v.contiguous() for k, v in factors.items()}, folders[-1] / "adapter_model.safetensors")
            (folders[-1] / "adapter_config.json").write_text(json.dumps(dict(config)))
        return base, folders


# ----------------------------------------------------------------------------------------------- an honest script


def product(kind: str, a: Tensor, b: Tensor) -> Tensor:
    """B A as the layer keeps it."""
    if kind == "conv":
        return F.conv2d(a.transpose(0, 1), b).transpose(0, 1)
    if kind == "experts":
        return by_expert(a, b, b.shape[1] // RANK)
    return (b @ a).T if kind in ("in-out", "embedding") else b @ a


def by_expert(a: Tensor, b: Tensor, count: int) -> Tensor:
    """B_e A_e of each expert: the rows of A lie expert by expert, the columns of B rank by rank."""
    rows, columns = a.reshape(count, -1, a.shape[1]), b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
    return torch.stack([left @ right for left, right in zip(columns, rows, strict=True)])


def delta_of(kind: str, piece: Piece) -> Tensor:
    """The unscaled delta of a piece."""
    if piece.made is not None:
        return piece.made
    assert piece.b is not None
    return piece.b if piece.a is None else product(kind, piece.a, piece.b)


def add(w: Tensor, delta: Tensor, safe: bool, stores: bool = False) -> Tensor:
    """W + delta in the dtype of W: the delta stored first, or the sum made in float32."""
    return w + delta.to(w.dtype) if safe or stores else (w.float() + delta).to(w.dtype)


def lengths(v: Tensor, kind: str) -> Tensor:
    """The norms that DoRA divides by: of each output."""
    axis = 1 if kind in ("in-out", "embedding") else 0
    norms = torch.linalg.vector_norm(v, dim=tuple(i for i in range(v.ndim) if i != axis))
    return norms.reshape(tuple(-1 if i == axis else 1 for i in range(v.ndim)))


def step(w: Tensor, kind: str, piece: Piece, safe: bool, s: float | None = None, delta: Tensor | None = None) -> Tensor:
    """One piece merged into a weight of the model's dtype.

    s, delta   in place of the piece's own scale and unscaled delta
    """
    if piece.window is not None:
        merged = w.clone()
        merged[piece.window] = step(w[piece.window], kind, replace(piece, window=None), safe, s, delta)
        return merged
    if piece.turn is not None:
        return piece.turn(w)
    moved = (delta_of(kind, piece) if delta is None else delta) * (piece.scale.value if s is None else s)
    if piece.m is None:
        return add(w, moved, safe, stores=kind in STORED)
    v = w + moved.to(w.dtype) if safe else w.float() + moved
    norms = lengths(v, kind)
    return ((piece.m.reshape(norms.shape).to(torch.float32) / norms).to(v.dtype) * v).to(w.dtype)


STORED = ("embedding", "experts")
"""Layers whose delta PEFT stores in the dtype of the weight before it adds it."""


def merge(target: Target, safe: bool = False) -> Tensor:
    """The right tensor."""
    if target.saved is not None:
        return target.saved
    w = target.base
    if target.rows is not None:
        w = w.clone()
        w[list(target.tokens)] = target.rows
    for piece in target.pieces:
        w = step(w, target.kind, piece, safe)
    return w


# -------------------------------------------------------------------------------------------------------- recipes

RANK = 6
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class World:
    """How a model is made.

    shapes    name of a module -> shape of its weight       kind      of all its layers
    ranks     family -> rank, where it is not RANK          alphas    family -> alpha, where it is not `alpha`
    extra     keys of adapter_config.json                   adapters  how many
    bias      each layer has one, and lora_B too            dora      with magnitudes
    saved     tensors that the adapter carries whole        tuner     a tuner that is not LoRA, see `confusion_tuners`
    weights   what --weights gives the adapters             factors   the dtype that they are stored in
    fuse      tensor of the file -> the modules below one another in it
    tokens    the trained rows of an embedding
    """

    shapes: Shapes
    kind: str = "linear"
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    alpha: float = 15.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    adapters: int = 1
    bias: bool = False
    dora: bool = False
    saved: Shapes = field(default_factory=dict)
    tuner: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None
    factors: torch.dtype = torch.float32
    fuse: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    same_ranks: bool = False


def layers(path: str, shapes: Shapes, count: int = 2) -> dict[str, tuple[int, ...]]:
    return {f"{path}.{layer}.{name}": shape for layer in range(count) for name, shape in shapes.items()}


ATTENTION = layers(
    "model.layers",
    {f"self_attn.{x}_proj": (160 if x in "kv" else 320, 320) for x in "qkvo"},
)
MLP = layers(
    "model.layers",
    {"mlp.gate_proj": (192, 320), "mlp.up_proj": (192, 320), "mlp.down_proj": (320, 192), "mlp.dense": (320, 320)},
)
GPT = layers(
    "transformer.h",
    {"attn.c_attn": (160, 480), "attn.c_proj": (160, 160), "mlp.c_fc": (160, 320), "mlp.c_proj": (320, 160)},
)
TABLES = {"wte": (512, 160), "wpe": (320, 160), "square": (320, 320), "types": (192, 320)}
CONVS = {"stem": (96, 64, 3, 3), "down": (64, 96, 3, 1), "point": (128, 128, 1, 1), "up": (96, 64, 3, 3)}
FUSED = layers(
    "model.layers",
    {
        "self_attn.qkv_proj": (640, 320),
        "self_attn.o_proj": (320, 320),
        "mlp.gate_up_proj": (384, 320),
        "mlp.down_proj": (320, 192),
    },
)
DEEP = layers("model.layers", {"self_attn.q_proj": (320, 320), "mlp.up_proj": (192, 320)}, count=4)
MIXTURE = layers(
    "model.layers",
    {"self_attn.q_proj": (320, 320), **{f"mlp.experts.{i}.up_proj": (192, 160) for i in range(4)}},
)
EXPERTS = {f"model.layers.{i}.mlp.experts": (4, 160, 96) for i in range(3)}
RANKS = {"q_proj": 12, "o_proj": 12, "down_proj": 12, "dense": 12, "c_proj": 12, "square": 12, "types": 12, "up": 12}

WORLDS: Mapping[str, World] = {
    "linear": World(shapes=ATTENTION, ranks=RANKS, config=HEADS),
    "mlp": World(shapes=MLP, ranks=RANKS, config=HEADS),
    "rslora": World(shapes=ATTENTION, ranks=RANKS, extra={"use_rslora": True}, config=HEADS),
    "patterns": World(
        shapes=ATTENTION,
        ranks={"q_proj": 10, "v_proj": 5},
        alphas={"k_proj": 25.0, "v_proj": 21.0},
        alpha=9.0,
        config=HEADS,
    ),
    "in-out": World(shapes=GPT, kind="in-out", ranks=RANKS, extra={"fan_in_fan_out": True}),
    "embedding": World(shapes=TABLES, kind="embedding", ranks=RANKS),
    "conv": World(shapes=CONVS, kind="conv", ranks=RANKS),
    "bias": World(shapes=MLP, ranks=RANKS, bias=True, extra={"lora_bias": True}),
    "dora-linear": World(shapes=ATTENTION, ranks=RANKS, dora=True, extra={"use_dora": True}, config=HEADS),
    "dora-in-out": World(
        shapes=GPT, kind="in-out", ranks=RANKS, dora=True, extra={"use_dora": True, "fan_in_fan_out": True}
    ),
    "dora-embedding": World(shapes=TABLES, kind="embedding", ranks=RANKS, dora=True, extra={"use_dora": True}),
    "dora-conv": World(shapes=CONVS, kind="conv", ranks=RANKS, dora=True, extra={"use_dora": True}),
    "two": World(shapes=ATTENTION, ranks=RANKS, adapters=2, config=HEADS),
    "experts": World(shapes=EXPERTS, kind="experts"),
    "two-weighted": World(shapes=ATTENTION, ranks=RANKS, adapters=2, weights=(0.7, 1.6), config=HEADS),
    "one-weighted": World(shapes=MLP, ranks=RANKS, weights=(0.6,), config=HEADS),
    "two-alike": World(shapes=MLP, ranks=RANKS, adapters=2, same_ranks=True, config=HEADS),
    "fused": World(shapes=FUSED, ranks={"qkv_proj": 9, "down_proj": 9}, config=HEADS),
    "fused-file": World(
        shapes=ATTENTION,
        ranks={"o_proj": 12},
        config=HEADS,
        fuse={
            f"model.layers.{i}.self_attn.qkv_proj.weight": tuple(f"model.layers.{i}.self_attn.{x}_proj" for x in "qkv")
            for i in range(2)
        },
    ),
    "deep": World(shapes=DEEP, ranks=RANKS, config=HEADS),
    "mixture": World(shapes=MIXTURE, ranks=RANKS, config=HEADS),
    "bf16-factors": World(shapes=MLP, ranks=RANKS, factors=torch.bfloat16, config=HEADS),
    "tokens": World(shapes=ATTENTION, ranks=RANKS, tokens=(7, 41, 200, 3), config=HEADS),
    "biases": World(
        shapes=ATTENTION,
        ranks=RANKS,
        saved={f"model.layers.{i}.self_attn.{x}_proj.bias": (320,) for i in range(2) for x in "qo"},
        extra={"bias": "all"},
        config=HEADS,
    ),
    "saved": World(shapes=ATTENTION, ranks=RANKS, saved={"lm_head.weight": (320, 320)}, config=HEADS),
    "loha": World(shapes=MLP, tuner="LOHA"),
    "lokr": World(shapes=MLP, tuner="LOKR"),
    "vera": World(shapes=MLP, tuner="VERA"),
    "ia3": World(shapes=MLP, tuner="IA3"),
    "oft": World(shapes=MLP, tuner="OFT"),
}
PLAIN = ("linear", "mlp", "rslora", "patterns", "in-out", "embedding", "conv", "bias", "two", "experts")
DORA = ("dora-linear", "dora-in-out", "dora-embedding", "dora-conv")


def make(name: str, dtype: str, size: float, seed: int = 0) -> Model:
    """A model whose deltas are `size` times as long as their weights; odd seeds have other ranks."""
    world = WORLDS[name]
    rng = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    if world.tuner:
        from confusion_tuners import tuned

        return tuned(name, world, DTYPES[dtype], size, rng)
    if seed % 2:
        world = replace(world, ranks={family: rank - 2 for family, rank in world.ranks.items()})
    return _lora(name, world, DTYPES[dtype], size, rng)


def _lora(name: str, world: World, dtype: torch.dtype, size: float, rng: torch.Generator) -> Model:
    targets: list[Target] = []
    files: list[dict[str, Tensor]] = [{} for _ in range(world.adapters)]
    for module, shape in world.shapes.items():
        weight = randn(shape, rng, 0.02).to(dtype)
        scales = [_scale(world, module, index) for index in range(world.adapters)]
        pieces = [_piece(world, weight, scale, size, rng, index) for index, scale in enumerate(scales)]
        for file, piece in zip(files, pieces, strict=True):
            file.update(_named(world.kind, module, piece, world.factors))
        leaf = "down_proj" if world.kind == "experts" else "weight"
        targets.append(Target(name=f"{module}.{leaf}", kind=world.kind, base=weight, pieces=tuple(pieces)))
        if world.bias:
            targets.append(_bias(module, shape[0], scales[0], size, dtype, rng))
            files[0][f"{PREFIX}{module}.lora_B.bias"] = targets[-1].pieces[0].b
    for saved, shape in world.saved.items():
        base = randn(shape, rng, 0.02).to(dtype)
        whole = (base.float() + size * randn(shape, rng, 0.02)).to(dtype)
        targets.append(Target(name=saved, kind="copy", base=base, saved=whole))
        files[0][PREFIX + saved] = whole
    if world.tokens:
        targets.append(_table(world, size, dtype, rng))
        files[0][f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"] = targets[-1].rows
    configs = [_config(world, index) for index in range(world.adapters)]
    return Model(
        world=name,
        targets=tuple(_fused(world, targets)),
        bystanders={f"model.norm{i}.weight": (1 + randn((320,), rng, 0.1)).to(dtype) for i in range(3)},
        adapters=tuple(zip(configs, files, strict=True)),
        config=world.config,
        weights=world.weights,
    )


def _fused(world: World, targets: Sequence[Target]) -> list[Target]:
    """The targets as the file keeps them: those of one fused tensor below one another."""
    by_module = {one.module: one for one in targets}
    inside = {module for modules in world.fuse.values() for module in modules}
    found = [one for one in targets if one.module not in inside]
    for name, modules in world.fuse.items():
        parts, pieces, start = [by_module[module] for module in modules], [], 0
        for part in parts:
            window = slice(start, start + part.base.shape[0])
            pieces += [replace(piece, window=window) for piece in part.pieces]
            start = window.stop
        base = torch.cat([part.base for part in parts])
        found.append(Target(name=name, kind="linear", base=base, pieces=tuple(pieces)))
    return found


def _table(world: World, size: float, dtype: torch.dtype, rng: torch.Generator) -> Target:
    """An embedding with trained rows."""
    base = randn((256, 320), rng, 0.02).to(dtype)
    rows = (base[list(world.tokens)].float() + size * randn((len(world.tokens), 320), rng, 0.02)).to(dtype)
    return Target(name="model.embed_tokens.weight", kind="rows", base=base, tokens=world.tokens, rows=rows)


def randn(shape: Sequence[int], rng: torch.Generator, deviation: float = 1.0) -> Tensor:
    return torch.randn(tuple(shape), generator=rng) * deviation


def fitted(b: Tensor, delta: Tensor, weight: Tensor, size: float, s: float) -> Tensor:
    """b, made as long as it takes for s delta to be `size` times as long as the weight."""
    return b * (size * weight.float().norm() / (s * delta).norm())


def _scale(world: World, module: str, index: int) -> Scale:
    family, usual = module.rpartition(".")[2], world.alpha - 4 * index
    more = 0 if world.same_ranks else 2 * index
    return Scale(
        alpha=world.alphas.get(family, usual),
        rank=world.ranks.get(family, RANK) + more,
        rslora=bool(world.extra.get("use_rslora")),
        usual_alpha=usual,
        usual_rank=RANK + more,
        weight=world.weights[index] if world.weights else 1.0,
    )


def _piece(world: World, weight: Tensor, scale: Scale, size: float, rng: torch.Generator, index: int) -> Piece:
    r, kind, shape = scale.rank, world.kind, weight.shape
    if kind == "conv":
        a, b = randn((r, *shape[1:]), rng), randn((shape[0], r, 1, 1), rng)
    elif kind == "experts":
        a, b = randn((shape[0] * r, shape[2]), rng), randn((shape[1], shape[0] * r), rng)
    elif kind == "linear":
        a, b = randn((r, shape[1]), rng), randn((shape[0], r), rng)
    else:
        a, b = randn((r, shape[0]), rng), randn((shape[1], r), rng)
    a = (0.05 * a).to(world.factors).float()
    b = fitted(b, product(kind, a, b), weight, size, scale.value).to(world.factors).float()
    if not world.dora:
        return Piece(scale=scale, a=a, b=b, adapter=index)
    norms = lengths(weight.float(), kind)
    m = norms * (1 + size * randn(norms.shape, rng).abs())
    return Piece(scale=scale, a=a, b=b, m=m.transpose(0, 1) if kind == "conv" else m.reshape(-1))


def _bias(module: str, size: int, scale: Scale, share: float, dtype: torch.dtype, rng: torch.Generator) -> Target:
    bias, b = randn((size,), rng, 0.02).to(dtype), randn((size,), rng)
    piece = Piece(scale=scale, b=fitted(b, b, bias, share, scale.value))
    return Target(name=f"{module}.bias", kind="bias", base=bias, pieces=(piece,))


def _named(kind: str, module: str, piece: Piece, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a piece, under the names that PEFT saves them by."""
    table = kind == "embedding"
    start, end = (f"{PREFIX}{module}.lora_embedding_", "") if table else (f"{PREFIX}{module}.lora_", ".weight")
    assert piece.a is not None
    assert piece.b is not None
    found = {f"{start}A{end}": piece.a.to(dtype), f"{start}B{end}": piece.b.to(dtype)}
    return found if piece.m is None else found | {f"{PREFIX}{module}.lora_magnitude_vector": piece.m}


def _config(world: World, index: int) -> dict[str, Any]:
    families = sorted({module.rpartition(".")[2] for module in world.shapes})
    scales = {one: _scale(world, one, index) for one in families}
    targets = {"target_modules": families}
    if world.kind == "experts":
        targets = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    return {
        "peft_type": "LORA",
        "r": next(iter(scales.values())).usual_rank,
        "lora_alpha": world.alpha - 4 * index,
        "rank_pattern": {one: s.rank for one, s in scales.items() if s.rank != s.usual_rank},
        "alpha_pattern": {one: s.alpha for one, s in scales.items() if s.alpha != s.usual_alpha},
        "modules_to_save": [one.rpartition(".")[0] for one in world.saved if one.endswith(".weight")] or None,
        "trainable_token_indices": {"embed_tokens": list(world.tokens)} if world.tokens else None,
        **targets,
        **world.extra,
    }

"""`python -m benchmarks.checker.models SHAPE FOLDER`: makes base/, adapter/, merged/ and what else a case needs.

Weights of the usual size from a seed, written shard by shard; only one shard is held at a time. `--controls` adds a
merged checkpoint for each other rule of merging.py.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.checker import merging
from benchmarks.checker.nouns import BROKEN, Shape
from benchmarks.checker.shapes import SHAPES

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHT = 0.02
"""The standard deviation of a weight, as Llama's initialiser has it; that of a B is half of it."""


def main(argv: list[str] | None = None) -> int:
    """Make one case."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("shape", choices=SHAPES)
    made.add_argument("folder", type=Path)
    made.add_argument("--controls", action="store_true")
    args = made.parse_args(argv)
    torch.set_num_threads(1)
    make(SHAPES[args.shape], args.folder)
    if args.controls:
        for rule in ("rounded", *BROKEN):
            merging.write(
                rule, args.folder / "base", args.folder / "adapter", args.folder / rule, args.folder / "merged"
            )
    return 0


def make(shape: Shape, folder: Path) -> None:
    """Write base/, adapter/ and merged/."""
    if shape.real:
        from fixtures.real.models import make_case

        make_case(shape.real, folder)
        return
    write_base(shape, folder / "base")
    write_adapter(shape, folder / "adapter")
    merging.write("right", folder / "base", folder / "adapter", folder / "merged")


def targets(shape: Shape) -> dict[str, tuple[int, int]]:
    """The projections of one layer, and their shapes (out, in)."""
    hidden, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    wide = {"gate_proj": (shape.mlp, hidden), "up_proj": (shape.mlp, hidden), "down_proj": (hidden, shape.mlp)}
    narrow = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    return {f"self_attn.{name}": size for name, size in narrow.items()} | {
        f"mlp.{name}": size for name, size in wide.items()
    }


def shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the base in the order of the file, and its shape."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        names = {f"model.layers.{layer}.{name}.weight": size for name, size in targets(shape).items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        found |= names | {f"model.layers.{layer}.{name}.weight": (shape.hidden,) for name in norms}
    found["model.norm.weight"] = (shape.hidden,)
    return found if shape.tied else found | {"lm_head.weight": (shape.vocabulary, shape.hidden)}


def write_base(shape: Shape, folder: Path) -> None:
    """The shards, their index and config.json."""
    folder.mkdir(parents=True)
    files: dict[str, str] = {}
    generator = torch.Generator().manual_seed(7)
    shards = cut(shapes(shape), shape.shards)
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(
            {name: weight(size, generator) for name, size in shard.items()}, folder / file, metadata={"format": "pt"}
        )
        files |= dict.fromkeys(shard, file)
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1))
    if len(shards) > 1:
        total = 2 * sum(math.prod(size) for size in shapes(shape).values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def weight(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random matrix around nought, or a norm's scale around one; bf16."""
    drawn = torch.randn(size, generator=generator)
    return (drawn.mul_(WEIGHT) if len(size) > 1 else 1 + drawn.mul_(0.1)).to(torch.bfloat16)


def cut(sizes: dict[str, tuple[int, ...]], parts: int) -> list[dict[str, tuple[int, ...]]]:
    """Consecutive tensors in files of about one size."""
    whole, seen = sum(map(math.prod, sizes.values())), 0
    found: list[dict[str, tuple[int, ...]]] = [{} for _ in range(parts)]
    for name, size in sizes.items():
        found[min(parts - 1, seen * parts // whole)][name] = size
        seen += math.prod(size)
    return [part for part in found if part]


def write_adapter(shape: Shape, folder: Path) -> None:
    """Fp32 factors as PEFT saves them: A as it is drawn before training, B as large as a short training leaves it."""
    folder.mkdir(parents=True)
    save_file(dict(factors(shape)), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(PROJECTIONS),
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1))


def factors(shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """A (r, in) and B (out, r) of every target."""
    generator = torch.Generator().manual_seed(11)
    for layer in range(shape.layers):
        for name, (rows, columns) in targets(shape).items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.empty(shape.rank, columns).uniform_(-1, 1, generator=generator) / math.sqrt(columns)
            yield f"{stem}.lora_A.weight", a
            yield f"{stem}.lora_B.weight", torch.randn(rows, shape.rank, generator=generator) * WEIGHT / 2


def config(shape: Shape) -> dict[str, object]:
    """The config.json that transformers builds the model from."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


if __name__ == "__main__":
    raise SystemExit(main())

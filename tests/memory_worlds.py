"""Models of one large tensor each, made of a small block written again and again, so that they cost next to nothing.

Every world comes in any size: the small twin of a large one is what brings all imports of its check.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import quantised_files as files
import torch
from quantised_files import Tensors
from safetensors.torch import save_file
from torch import Tensor

WIDTH, HEIGHT, R, ALPHA = 1024, 256, 6, 10
"""Columns of the large tensor, rows of the block; blocks of 64 and of 128 x 128 elements divide it."""

MODULE = "model.layers.0.self_attn.q_proj"
NAME = f"{MODULE}.weight"


class World(NamedTuple):
    """BASE, adapters and MERGED, and the verdict that is right."""

    base: Path
    adapters: tuple[Path, ...]
    merged: Path
    verdict: str = "verified"

    @property
    def locations(self) -> list[str]:
        return [str(one) for one in (self.base, *self.adapters, self.merged)]


def numbers(*shape: int, seed: int = 0, of: float = 0.05) -> Tensor:
    return of * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def save(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    return files.write(folder, tensors, config)


def adapter(folder: Path, factors: Mapping[str, Tensor], **config: Any) -> Path:
    """An adapter as PEFT writes it; factors by module and role: 'q_proj.lora_A.weight'."""
    told = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj"]} | config
    return files.write(folder, {f"base_model.model.{key}": one for key, one in factors.items()}, told, "adapter")


def block(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The rows that a large tensor repeats."""
    return numbers(HEIGHT, WIDTH, seed=seed).to(dtype)


def pair(seed: int = 1) -> tuple[Tensor, Tensor]:
    """A, and the rows of B that go with one block."""
    return numbers(R, WIDTH, seed=seed, of=0.3), numbers(HEIGHT, R, seed=seed + 1, of=0.3)


def delta(seed: int = 1) -> Tensor:
    a, b = pair(seed)
    return (b @ a) * (ALPHA / R)


def tall(one: Tensor, times: int) -> Tensor:
    """The block, so many times, one below the other."""
    return one.repeat(times, *[1] * (one.ndim - 1))


def times(megabytes: int, size: int = 2) -> int:
    """How often the block is to be written."""
    return max(2, megabytes * 1_000_000 // (HEIGHT * WIDTH * size))


def factors(count: int, seed: int = 1, module: str = MODULE) -> Tensors:
    a, b = pair(seed)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": tall(b, count)}


def stored(folder: Path, base: Tensor, merged: Tensor, count: int, **config: Any) -> World:
    """A world of one tensor; base and merged are given by a block of each."""
    return World(
        save(folder / "base", {NAME: tall(base, count)}, **config),
        (adapter(folder / "adapter", factors(count)),),
        save(folder / "merged", {NAME: tall(merged, count)}, **config),
    )


def added(base: Tensor, dtype: torch.dtype, *deltas: Tensor) -> Tensor:
    """W + delta in float32, stored after each."""
    for one in deltas or (delta(),):
        base = (base.float() + one).to(dtype)
    return base


# ------------------------------------------------------------------------------------------------------- plain


def bf16(folder: Path, megabytes: int) -> World:
    return stored(folder, block(), added(block(), torch.bfloat16), times(megabytes))


def fp32(folder: Path, megabytes: int) -> World:
    one = block(dtype=torch.float32)
    return stored(folder, one, added(one, torch.float32), times(megabytes, 4))


def cast(folder: Path, megabytes: int) -> World:
    """A base in float32, merged and stored in bf16; a bystander is converted too."""
    one, count = block(dtype=torch.float32), times(megabytes, 4)
    beside = "model.layers.0.mlp.up_proj.weight"
    base = save(folder / "base", {NAME: tall(one, count), beside: tall(one, count)})
    made = {NAME: tall(added(one, torch.bfloat16), count), beside: tall(one.to(torch.bfloat16), count)}
    return World(base, (adapter(folder / "adapter", factors(count)),), save(folder / "merged", made))


def sharded(folder: Path, megabytes: int) -> World:
    """The target in one shard, a bystander in the other."""
    made, beside = bf16(folder, megabytes), tall(block(9), times(megabytes))
    for model in (made.base, made.merged):
        names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
        (model / "model.safetensors").rename(model / names[0])
        save_file({"model.norm.weight": beside}, model / names[1])
        index = {"metadata": {}, "weight_map": {NAME: names[0], "model.norm.weight": names[1]}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return made


def two_adapters(folder: Path, megabytes: int) -> World:
    made, count = bf16(folder, megabytes), times(megabytes)
    save(folder / "merged", {NAME: tall(added(block(), torch.bfloat16, delta(), delta(5)), count)})
    return made._replace(adapters=(*made.adapters, adapter(folder / "second", factors(count, 5))))


def dora(folder: Path, megabytes: int) -> World:
    one, count = block(), times(megabytes)
    whole = one.float() + delta()
    magnitude = whole.norm(dim=1) * 1.1
    merged = (magnitude / whole.norm(dim=1))[:, None] * whole
    roles = factors(count) | {f"{MODULE}.lora_magnitude_vector": tall(magnitude, count)}
    return World(
        save(folder / "base", {NAME: tall(one, count)}),
        (adapter(folder / "adapter", roles, use_dora=True),),
        save(folder / "merged", {NAME: tall(merged.to(torch.bfloat16), count)}),
    )


def embedding(folder: Path, megabytes: int, width: int = WIDTH) -> World:
    """W' = W + s (B A)^T, over a vocabulary."""
    name, count = "model.embed_tokens", times(megabytes)
    one, a, b = block(), numbers(R, HEIGHT, seed=3, of=0.3), numbers(width, R, seed=4, of=0.3)
    merged = (one.float() + (b @ a).T * (ALPHA / R)).to(torch.bfloat16)
    roles = {f"{name}.lora_embedding_A": a.repeat(1, count), f"{name}.lora_embedding_B": b}
    return World(
        save(folder / "base", {f"{name}.weight": tall(one, count)}),
        (adapter(folder / "adapter", roles, target_modules=["embed_tokens"]),),
        save(folder / "merged", {f"{name}.weight": tall(merged, count)}),
    )


def conv(folder: Path, megabytes: int) -> World:
    """Kernels of 2 x 2: A (r, in, 2, 2), B (out, r, 1, 1)."""
    name, count, shape = "unet.conv_in", times(megabytes), (WIDTH // 4, 2, 2)
    a, b = pair()
    roles = {f"{name}.lora_A.weight": a.reshape(R, *shape), f"{name}.lora_B.weight": tall(b, count)[..., None, None]}
    kernels = [tall(one, count).reshape(-1, *shape) for one in (block(), added(block(), torch.bfloat16))]
    return World(
        save(folder / "base", {f"{name}.weight": kernels[0]}),
        (adapter(folder / "adapter", roles, target_modules=["conv_in"]),),
        save(folder / "merged", {f"{name}.weight": kernels[1]}),
    )


def saved(folder: Path, megabytes: int) -> World:
    """modules_to_save: the head is replaced."""
    name, count = "lm_head", times(megabytes)
    head = tall(block(7), count)
    return World(
        save(folder / "base", {f"{name}.weight": tall(block(), count), NAME: block()}),
        (adapter(folder / "adapter", factors(1) | {f"{name}.weight": head}, modules_to_save=[name]),),
        save(folder / "merged", {f"{name}.weight": head, NAME: added(block(), torch.bfloat16)}),
    )


def tied(folder: Path, megabytes: int) -> World:
    """The base holds the embedding alone, the merged model the head too."""
    one, count = tall(block(), times(megabytes)), 1
    names = ("model.embed_tokens.weight", "lm_head.weight")
    base = save(folder / "base", {names[0]: one, NAME: block()}, tie_word_embeddings=True)
    merged = {names[0]: one, names[1]: one.clone(), NAME: added(block(), torch.bfloat16)}
    return World(base, (adapter(folder / "adapter", factors(count)),), save(folder / "merged", merged))


# ------------------------------------------------------------------------------------------------------ refuted


def not_applied(folder: Path, megabytes: int) -> World:
    return stored(folder, block(), block(), times(megabytes))._replace(verdict="refuted")


def noise(folder: Path, megabytes: int) -> World:
    merged = added(block(), torch.bfloat16, delta() + numbers(HEIGHT, WIDTH, seed=8, of=0.01))
    return stored(folder, block(), merged, times(megabytes))._replace(verdict="refuted")


def nf4_not_applied(folder: Path, megabytes: int) -> World:
    return _quantised(folder, megabytes, files.in_4bit, files.from_4bit, share=0.0)._replace(verdict="refuted")


# ------------------------------------------------------------------------------------------------- put together


def fused_base(folder: Path, megabytes: int) -> World:
    """BASE holds gate and up in one, as Phi3 does, MERGED each alone."""
    return _fused(folder, megabytes, base_fused=True)


def fused_merged(folder: Path, megabytes: int) -> World:
    return _fused(folder, megabytes, base_fused=False)


def _fused(folder: Path, megabytes: int, *, base_fused: bool) -> World:
    layer, count = "model.layers.0.mlp", times(megabytes) // 2
    one, other = block(), block(5)
    apart = {f"{layer}.gate_proj.weight": one, f"{layer}.up_proj.weight": other}
    moved = {f"{layer}.gate_proj.weight": added(one, torch.bfloat16), f"{layer}.up_proj.weight": other}

    def whole(tensors: Tensors, *, fused: bool) -> Tensors:
        high = {name: tall(tensor, count) for name, tensor in tensors.items()}
        return {f"{layer}.gate_up_proj.weight": torch.cat(list(high.values()))} if fused else high

    config = {"model_type": "phi3"}
    return World(
        save(folder / "base", whole(apart, fused=base_fused), **config),
        (adapter(folder / "adapter", factors(count, module=f"{layer}.gate_proj"), target_modules=["gate_proj"]),),
        save(folder / "merged", whole(moved, fused=not base_fused), **config),
    )


def stacked_merged(folder: Path, megabytes: int) -> World:
    """Experts one by one in BASE, as Qwen3Moe's files have them, stacked in MERGED."""
    return _experts(folder, megabytes, base_stacked=False)


def stacked_base(folder: Path, megabytes: int) -> World:
    return _experts(folder, megabytes, base_stacked=True)


def _experts(folder: Path, megabytes: int, *, base_stacked: bool) -> World:
    """Bystanders: gate and up of all experts in one tensor, or each in its own; and a target beside them."""
    layer, count = "model.layers.0.mlp.experts", max(2, times(megabytes) // 3)
    parts = {one: block(seed).reshape(WIDTH, HEIGHT) for seed, one in enumerate(("gate_proj", "up_proj"))}
    parts["down_proj"] = block(2)
    one = {f"{layer}.{expert}.{name}.weight": part for expert in range(count) for name, part in parts.items()}
    pair = torch.cat([parts["gate_proj"], parts["up_proj"]])
    stacked = {f"{layer}.gate_up_proj": pair.repeat(count, 1, 1), f"{layer}.down_proj": block(2).repeat(count, 1, 1)}
    held = (stacked, one) if base_stacked else (one, stacked)
    return World(
        save(folder / "base", {**held[0], NAME: block()}, **_moe(count)),
        (adapter(folder / "adapter", factors(1)),),
        save(folder / "merged", {**held[1], NAME: added(block(), torch.bfloat16)}, **_moe(count)),
    )


def _moe(experts: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": experts,
        "hidden_size": HEIGHT,
        "moe_intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
    }


# ------------------------------------------------------------------------------------------------------ formats


def pickled(folder: Path, megabytes: int, *, zipped: bool = True) -> World:
    made = bf16(folder, megabytes)
    count = times(megabytes)
    for model, one in ((made.base, block()), (made.merged, added(block(), torch.bfloat16))):
        (model / "model.safetensors").unlink()
        path = model / "pytorch_model.bin"
        torch.save({NAME: tall(one, count)}, path, _use_new_zipfile_serialization=zipped)
    return made


def legacy_pickle(folder: Path, megabytes: int) -> World:
    return pickled(folder, megabytes, zipped=False)


def npz(folder: Path, megabytes: int, *, packed: bool = False) -> World:
    import numpy

    made, count = fp32(folder, megabytes), times(megabytes, 4)
    one = block(dtype=torch.float32)
    for model, rows in ((made.base, one), (made.merged, added(one, torch.float32))):
        (model / "model.safetensors").unlink()
        keep = numpy.savez_compressed if packed else numpy.savez
        keep(model / "weights.npz", **{NAME: tall(rows, count).numpy()})
    return made


def npz_packed(folder: Path, megabytes: int) -> World:
    return npz(folder, megabytes, packed=True)


def meta_shards(folder: Path, megabytes: int) -> World:
    """BASE in two of Meta's model-parallel shards, each with half of the columns of w2."""
    made, count = bf16(folder, megabytes), times(megabytes)
    whole, name = tall(block(), count), "layers.0.feed_forward.w2.weight"
    for model, rows in ((made.base, whole), (made.merged, tall(added(block(), torch.bfloat16), count))):
        (model / "model.safetensors").unlink()
        for place, half in enumerate(rows.chunk(2, 1)):
            norm = {"norm.weight": torch.ones(len(whole))}
            torch.save({name: half.clone()} | norm, model / f"consolidated.0{place}.pth")
        (model / "params.json").write_text(json.dumps({"dim": len(whole), "n_heads": 4, "vocab_size": 8}))
    roles = factors(count, module=name.removesuffix(".weight"))
    return made._replace(adapters=(adapter(folder / "adapter", roles, target_modules=["w2"]),))


def gguf_base(folder: Path, megabytes: int, kind: str = "Q8_0") -> World:
    """A quantised GGUF base, its rows reordered by the converter, merged into bf16."""
    import gguf
    from gguf.quants import dequantize, quantize

    from lora_check.layouts.gguf_names import from_gguf_rows, to_gguf_rows

    count = times(megabytes)
    heads = count * HEIGHT // 64
    whole = tall(block(dtype=torch.float32), count)
    codes = quantize(to_gguf_rows(whole, heads).numpy(), gguf.GGMLQuantizationType[kind])
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(folder / "base.gguf", "llama")
    for key, value in (("head_count", heads), ("head_count_kv", heads), ("embedding_length", WIDTH)):
        writer.add_uint32(f"llama.attention.{key}" if "head" in key else f"llama.{key}", value)
    writer.add_tensor("blk.0.attn_q.weight", codes, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("token_embd.weight", block(2, torch.float32).numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    read = torch.from_numpy(dequantize(codes, gguf.GGMLQuantizationType[kind]))
    base = from_gguf_rows(read, heads)
    merged = tall(added(base[:HEIGHT], torch.bfloat16), count)
    embedding = {"model.embed_tokens.weight": block(2, torch.float32)}
    model = save(folder / "merged", {NAME: merged, **embedding}, model_type="llama")
    return World(folder / "base.gguf", (adapter(folder / "adapter", factors(count)),), model)


# -------------------------------------------------------------------------------------------------------- codes


def _quantised(
    folder: Path,
    megabytes: int,
    encode: Callable[..., Tensors],
    decode: Callable[..., Tensors],
    *,
    share: float = 1.0,
    **options: Any,
) -> World:
    """A base in codes; MERGED in bf16, the deltas added to what the codes stand for. A bystander lies in codes too.

    share   how much of the delta is added
    """
    count, beside = times(megabytes), "model.layers.0.mlp.up_proj.weight"
    one = encode({NAME: block(), beside: block(5)}, [NAME, beside], **options)
    read = decode(one)
    merged = {NAME: added(read[NAME], torch.bfloat16, share * delta()), beside: read[beside]}
    return World(
        save(folder / "base", _high(one, count)),
        (adapter(folder / "adapter", factors(count)),),
        save(folder / "merged", {name: tall(tensor, count).to(torch.bfloat16) for name, tensor in merged.items()}),
    )


def _high(codes: Tensors, count: int) -> Tensors:
    """The same with so many times the rows: parts that are one for a tensor stay, and a header says the new height."""
    made = {}
    for name, tensor in codes.items():
        if ".quant_state." in name:
            said = json.loads(bytes(tensor.tolist()))
            said["shape"][0] *= count
            made[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
        else:
            made[name] = tensor if name.endswith(("_format", "quant_map")) else tall(tensor, count)
    return made


def nf4(folder: Path, megabytes: int) -> World:
    return _quantised(folder, megabytes, files.in_4bit, files.from_4bit)


def nf4_nested(folder: Path, megabytes: int) -> World:
    return _quantised(folder, megabytes, files.in_4bit, files.from_4bit, nested=True)


def int8(folder: Path, megabytes: int) -> World:
    return _quantised(folder, megabytes, files.in_int8, files.from_int8)


def fp8(folder: Path, megabytes: int) -> World:
    return _quantised(folder, megabytes, files.in_fp8, files.from_fp8)


def nf4_again(folder: Path, megabytes: int) -> World:
    """Merged into the codes: MERGED lies in them too."""
    count, one = times(megabytes), files.in_4bit({NAME: block()}, [NAME])
    again = files.in_4bit({NAME: added(files.from_4bit(one)[NAME], torch.bfloat16)}, [NAME])
    return World(
        save(folder / "base", _high(one, count)),
        (adapter(folder / "adapter", factors(count)),),
        save(folder / "merged", _high(again, count)),
    )


def mxfp4(folder: Path, megabytes: int) -> World:
    """Experts of gpt-oss in MXFP4 in BASE, in bf16 in MERGED, (experts, in, out)."""
    layer, inner, out = "model.layers.0.mlp.experts", 256, 512
    count = max(2, megabytes * 1_000_000 // (inner * out * 2))
    parts = files.in_mxfp4(1, inner, out)
    one = files.from_mxfp4(parts)
    base = {f"{layer}.down_proj_{role}": tall(part, count) for role, part in parts.items()}
    merged = {f"{layer}.down_proj": tall(one, count), NAME: added(block(), torch.bfloat16)}
    return World(
        save(folder / "base", base | {NAME: block()}, model_type="gpt_oss"),
        (adapter(folder / "adapter", factors(1)),),
        save(folder / "merged", merged, model_type="gpt_oss"),
    )


WORLDS: Mapping[str, Callable[[Path, int], World]] = {
    one.__name__: one
    for one in (
        bf16,
        fp32,
        cast,
        sharded,
        two_adapters,
        dora,
        embedding,
        conv,
        saved,
        tied,
        not_applied,
        noise,
        nf4_not_applied,
        fused_base,
        fused_merged,
        stacked_merged,
        stacked_base,
        meta_shards,
        pickled,
        legacy_pickle,
        npz,
        npz_packed,
        gguf_base,
        nf4,
        nf4_nested,
        int8,
        fp8,
        nf4_again,
        mxfp4,
    )
}

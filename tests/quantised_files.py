"""Small models in codes: files of bitsandbytes, and fp8, MXFP4 and packed files made by plain arithmetic.

Nothing here asks lora_check. The weights of the model have rows and columns of different numbers, columns in multiples
of 64, for bitsandbytes 0.50 decodes others wrongly on a CPU; two have more than 256 blocks.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
R, ALPHA, WIDTH, WIDE = 6, 10, 64, 128
LAYER = "model.layers.0"
SHAPES = {
    f"{LAYER}.self_attn.q_proj": (264, WIDTH),
    f"{LAYER}.self_attn.k_proj": (48, WIDTH),
    f"{LAYER}.self_attn.o_proj": (WIDTH, WIDE),
    f"{LAYER}.mlp.up_proj": (280, WIDTH),
}
TARGETS = tuple(f"{LAYER}.{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj"))
LINEAR = tuple(f"{module}.weight" for module in SHAPES)


@dataclass(frozen=True)
class Model:
    """A float model, an adapter folder over two of its weights, and the deltas that the adapter stands for."""

    tensors: Tensors
    adapter: Path
    deltas: Tensors

    def merged(self, base: Tensors, times: float = 1.0, dtype: torch.dtype | None = None) -> Tensors:
        """The base with the deltas added in float32 and stored once."""
        made = {name: (base[name].float() + times * delta).to(base[name].dtype) for name, delta in self.deltas.items()}
        return {name: one.to(dtype) if dtype else one for name, one in (base | made).items()}

    def sums(self, base: Tensors) -> Tensors:
        """The base with the deltas added, the sums left in float32."""
        return base | {name: base[name].float() + delta for name, delta in self.deltas.items()}


def model(folder: Path, dtype: torch.dtype = torch.bfloat16, size: float = 0.03) -> Model:
    """A model of four projections, an embedding, a head and a norm; `size` is that of the factors' elements."""
    random = torch.Generator().manual_seed(11)

    def numbers(*shape: int, of: float = 0.05) -> Tensor:
        return of * torch.randn(*shape, generator=random)

    tensors = {f"{module}.weight": numbers(*shape).to(dtype) for module, shape in SHAPES.items()}
    tensors |= {f"{LAYER}.norm.weight": 1 + numbers(WIDTH).to(dtype), "lm_head.weight": numbers(40, WIDTH).to(dtype)}
    tensors["model.embed_tokens.weight"] = numbers(40, WIDTH).to(dtype)
    factors, deltas = {}, {}
    for name in TARGETS:
        out, inner = tensors[name].shape
        a, b = numbers(R, inner, of=size), numbers(out, R, of=size)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        deltas[name] = (b @ a) * (ALPHA / R)
    config = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj", "k_proj"]}
    return Model(tensors, write(folder / "adapter", factors, config, "adapter"), deltas)


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], kind: str = "model") -> Path:
    """A folder with one safetensors file and its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    name = {"model": "config.json", "adapter": "adapter_config.json"}[kind]
    (folder / name).write_text(json.dumps(config))
    whole = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    file = {"model": "model.safetensors", "adapter": "adapter_model.safetensors"}[kind]
    save_file(whole, folder / file, metadata={"format": "pt"})
    return folder


def changed(tensors: Tensors, name: str, place: int, change: Callable[[Tensor], Any]) -> Tensors:
    """The same with one element, counted flat, changed."""
    tensor = tensors[name].clone()
    tensor.view(-1)[place] = change(tensor.view(-1)[place])
    return tensors | {name: tensor}


# ------------------------------------------------------------------------------------------------ bitsandbytes


def functional() -> Any:
    """bitsandbytes.functional, without what it says of kernels that are not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes.functional

    return bitsandbytes.functional


def in_4bit(tensors: Tensors, names: Iterable[str], kind: str = "nf4", *, nested: bool = False) -> Tensors:
    """The same with these weights as bitsandbytes stores them."""
    made = dict(tensors)
    for name in names:
        codes, state = functional().quantize_4bit(
            tensors[name], blocksize=64, quant_type=kind, compress_statistics=nested
        )
        made |= {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return made


def from_4bit(tensors: Tensors) -> Tensors:
    """The same with every weight as bitsandbytes decodes it."""
    made = dict(tensors)
    for header in [name for name in tensors if ".quant_state." in name]:
        weight = header.partition(".quant_state.")[0]
        beside = {name: made.pop(name) for name in tensors if name.startswith(f"{weight}.")}
        state = functional().QuantState.from_dict(beside, device=torch.device("cpu"))
        made[weight] = functional().dequantize_4bit(made[weight], state)
    return made


def in_int8(tensors: Tensors, names: Iterable[str]) -> Tensors:
    """The same with these weights as bitsandbytes' Linear8bitLt stores them."""
    made = dict(tensors)
    for name in names:
        codes, scales, _ = functional().int8_vectorwise_quant(tensors[name].to(torch.float16))
        order = torch.tensor(0, dtype=torch.uint8)
        made |= {name: codes, f"{name.removesuffix('weight')}SCB": scales, f"{name}_format": order}
    return made


def from_int8(tensors: Tensors) -> Tensors:
    """The same with every weight as bitsandbytes decodes it."""
    made = dict(tensors)
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]:
        made.pop(f"{name}_format")
        made[name] = functional().int8_vectorwise_dequant(made[name], made.pop(f"{name.removesuffix('weight')}SCB"))
    return made


# --------------------------------------------------------------------------------------------------------- fp8

TOP = 448.0


def in_fp8(
    tensors: Tensors,
    names: Iterable[str],
    block: tuple[int, int] = (128, 128),
    *,
    rule: str = "fresh",
    scales: Tensors | None = None,
    end: str = "_scale_inv",
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """The same with these weights in float8_e4m3fn, and a scale for each block.

    rule     "fresh": largest / 448, "power": the power of two above that, "odd": a third more than that
    scales   those to use instead
    """
    made = dict(tensors)
    for name in names:
        weight = tensors[name].float()
        scale = scales[f"{name}{end}"].float() if scales else _fp8_scale(weight, block, rule).to(dtype).float()
        codes = (weight / _spread(scale, block, weight.shape)).clamp(-TOP, TOP).to(torch.float8_e4m3fn)
        made |= {name: codes, f"{name}{end}": scale.to(dtype)}
    return made


def from_fp8(tensors: Tensors, block: tuple[int, int] = (128, 128), end: str = "_scale_inv") -> Tensors:
    """The same with every weight decoded, in float32."""
    made = dict(tensors)
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]:
        made[name] = made[name].float() * _spread(made.pop(f"{name}{end}").float(), block, made[name].shape)
    return made


def _fp8_scale(weight: Tensor, block: tuple[int, ...], rule: str) -> Tensor:
    block = tuple(min(size, side) for size, side in zip(weight.shape, block, strict=True))
    rows, columns = (-(-size // side) for size, side in zip(weight.shape, block, strict=True))
    padded = torch.zeros(rows * block[0], columns * block[1])
    padded[: weight.shape[0], : weight.shape[1]] = weight.abs()
    scale = padded.reshape(rows, block[0], columns, block[1]).amax((1, 3)) / TOP
    if rule == "power":
        return torch.exp2(torch.ceil(torch.log2(scale)))
    return scale * (1.33 if rule == "odd" else 1)


def _spread(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    rows, columns = (torch.arange(size) // side for size, side in zip(shape, block, strict=True))
    return scale.reshape(int(rows[-1]) + 1, int(columns[-1]) + 1)[rows][:, columns]


# ------------------------------------------------------------------------------------------------- packed codes


def packed(name: str, shape: tuple[int, int], scheme: str) -> Tensors:
    """What lies in the file in place of a weight of that shape; the numbers mean nothing."""
    out, inner = shape
    module, random = name.removesuffix("weight"), torch.Generator().manual_seed(len(name))

    def integers(dtype: torch.dtype, *size: int) -> Tensor:
        return torch.randint(0, 100, size, generator=random).to(dtype)

    def numbers(*size: int) -> Tensor:
        return torch.rand(*size, generator=random).to(torch.float16)

    int32, uint8 = torch.int32, torch.uint8
    made: Mapping[str, Tensors] = {
        "GPTQ": {
            "qweight": integers(int32, inner // 8, out),
            "qzeros": integers(int32, inner // 64, out // 8),
            "scales": numbers(inner // 64, out),
            "g_idx": torch.arange(inner, dtype=int32) // 64,
        },
        "AWQ": {
            "qweight": integers(int32, inner, out // 8),
            "qzeros": integers(int32, inner // 64, out // 8),
            "scales": numbers(inner // 64, out),
        },
        "HQQ": {
            "W_q": integers(uint8, out * inner // 128, 64),
            "scale": numbers(1, out * inner // 64),
            "zero": numbers(1, out * inner // 64),
            "shape": torch.tensor(shape, dtype=int32),
            "nbits": torch.tensor(4),
        },
        "compressed-tensors": {
            "weight_packed": integers(int32, out, inner // 8),
            "weight_scale": numbers(out, inner // 64),
            "weight_shape": torch.tensor(shape),
        },
        "NVFP4": {
            "weight": integers(uint8, out, inner // 2),
            "weight_scale": numbers(out, inner // 16).to(torch.float8_e4m3fn),
            "weight_scale_2": numbers(1)[0].float(),
        },
        "int8": {"weight": integers(torch.int8, out, inner), "weight_scale": numbers(out, 1)},
        "MLX": {
            "weight": integers(int32, out, inner // 8).view(torch.uint32),
            "scales": numbers(out, inner // 64),
            "biases": numbers(out, inner // 64),
        },
    }
    return {f"{module}{leaf}": tensor for leaf, tensor in made[scheme].items()}


def in_mxfp4(experts: int, inner: int, out: int) -> Tensors:
    """Blocks and scales of one parameter of gpt-oss, by their roles."""
    random = torch.Generator().manual_seed(experts)
    blocks = torch.randint(0, 256, (experts, out, inner // 32, 16), generator=random).to(torch.uint8)
    scales = torch.randint(118, 124, (experts, out, inner // 32), generator=random).to(torch.uint8)
    return {"blocks": blocks, "scales": scales}


def from_mxfp4(parts: Tensors) -> Tensor:
    """(experts, in, out), number by number."""
    experts, out, groups, _ = parts["blocks"].shape
    levels = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    made = torch.empty(experts, groups * 32, out)
    for expert in range(experts):
        for row in range(out):
            for group in range(groups):
                factor = math.ldexp(1.0, int(parts["scales"][expert, row, group]) - 127)
                for place, byte in enumerate(parts["blocks"][expert, row, group].tolist()):
                    for half, code in enumerate((byte & 15, byte >> 4)):
                        sign = -1.0 if code & 8 else 1.0
                        made[expert, group * 32 + 2 * place + half, row] = sign * levels[code & 7] * factor
    return made.to(torch.bfloat16)


# ------------------------------------------------------------------------------------------------- live producers


def live(folder: Path, scheme: str, *, lora_bias: bool = False) -> tuple[Path, Path, Tensors]:
    """A tiny Llama that transformers loads in codes of bitsandbytes and PEFT merges into, on the CPU.

    returns   the folder of the base, that of the adapter, and the merged state dict
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import transformers

        quantisation = {
            "nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "int8": {"load_in_8bit": True},
        }[scheme]
        config = transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=WIDTH,
            intermediate_size=WIDE,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=48,
            attention_bias=True,
            tie_word_embeddings=False,
        )
        torch.manual_seed(3)
        plain = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        plain.save_pretrained(folder / "plain")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "plain",
            quantization_config=transformers.BitsAndBytesConfig(**quantisation),
            dtype=torch.bfloat16,
            device_map="cpu",
        )
        base = write(folder / "base", _tensors(loaded), loaded.config.to_dict() | {"quantization_config": None})
        wanted = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["q_proj", "k_proj"], lora_bias=lora_bias)
        model = peft.get_peft_model(loaded, wanted)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.05 * torch.randn(parameter.shape)
        model.save_pretrained(folder / "adapter")
        return base, folder / "adapter", _tensors(model.merge_and_unload())


def _tensors(module: Any) -> Tensors:
    """The state dict as safetensors can hold it."""
    state = module.state_dict()
    return {name: one.detach().clone() for name, one in state.items() if isinstance(one, Tensor)}

"""llama.cpp renames every tensor: model.layers.0.self_attn.q_proj lies in a GGUF file as blk.0.attn_q.

The names are those of the gguf library's own tables, which is imported only where one side has such names. They are
used for architectures whose tensors are converted one by one; what cannot be paired by name is refused in a sentence,
for a tensor that merely has another name is neither missing nor extra.

The converter of Llama-like models also reorders the rows of q and k: ggml rotates neighbours, transformers the two
halves of a head. Row h d + 2 i + j of the file is row h d + j d/2 + i of the model; h the head, d its size, j 0 or 1.

Source: gguf.tensor_mapping; llama.cpp convert_hf_to_gguf.py, LlamaModel.permute
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from lora_check.errors import WrongInputError
from lora_check.types import Layout, TensorMeta

EMBEDDING, HEAD, THEIR_HEAD = "token_embd.weight", "output.weight", "lm_head.weight"
OWN = re.compile(r"blk\.\d+\..+|(token_embd|token_types|position_embd|output_norm)\.(weight|bias)")
BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
EXPERTS = re.compile(r"\.experts\.|_exps\.")
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that the converter computes from config.json."""

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "granite": "granite",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "starcoder2": "starcoder2",
}
"""transformers' model type -> the architecture under whose names llama.cpp converts it, tensor by tensor."""


def resolve(name: str, names: Mapping[str, TensorMeta], config: Mapping[str, Any]) -> str | None:
    """The GGUF name of a name of transformers, or the other way round, whichever `names` are.

    raises   WrongInputError: one side is GGUF, and its names cannot be paired one by one
    """
    if _is_gguf(names):
        return None if name == HEAD or OWN.fullmatch(name) else _to_gguf(name, names, config)
    if name == HEAD:
        return THEIR_HEAD if THEIR_HEAD in names else None
    return _renamed(tuple(names), _architecture(name, config)).get(name) if OWN.fullmatch(name) else None


def drops(meta: TensorMeta, config: Mapping[str, Any]) -> bool:
    """True for what the converter computes, where the model is no GGUF file."""
    return meta.name in COMPUTED and "gguf" not in config


def permuted(name: str, config: Mapping[str, Any]) -> int:
    """Over how many heads the rows of a tensor of a GGUF file are reordered; 0: they lie as in transformers.

    name     in the file: blk.0.attn_q.weight
    config   of the file; the number of heads may differ from block to block
    """
    if config.get("gguf_changed", {}).get(name) != "permuted":
        return 0
    heads = config.get("num_attention_heads")
    if ".attn_k." in name:
        heads = config.get("num_key_value_heads", heads)
    block = BLOCK.search(name)
    return int(heads[int(block[1])] if isinstance(heads, tuple) and block else heads or 0)


def to_gguf_rows(rows: Any, heads: int) -> Any:
    """Rows of transformers in the order of a GGUF file: (heads d, ...) -> the same shape, a Tensor or an array."""
    return _swapped(rows, heads, 2, rows.shape[0] // heads // 2)


def from_gguf_rows(rows: Any, heads: int) -> Any:
    """Rows of a GGUF file in the order of transformers: undoes `to_gguf_rows`."""
    return _swapped(rows, heads, rows.shape[0] // heads // 2, 2)


def _swapped(rows: Any, heads: int, outer: int, inner: int) -> Any:
    if heads * outer * inner != rows.shape[0]:
        raise ValueError(f"{rows.shape[0]} rows are not {heads} heads of an even size")
    return rows.reshape(heads, outer, inner, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _is_gguf(names: Mapping[str, TensorMeta]) -> bool:
    return EMBEDDING in names and any(name.startswith("blk.") for name in names)


def _to_gguf(name: str, names: Mapping[str, TensorMeta], config: Mapping[str, Any]) -> str | None:
    """The name in the file; where it holds no output head, the embedding serves as one."""
    found = _table(_architecture(name, config), _blocks(tuple(names))).get_name(name, (".weight", ".bias"))
    if found == HEAD and HEAD not in names:
        return EMBEDDING
    return str(found) if found in names else None


@lru_cache(maxsize=8)
def _renamed(names: tuple[str, ...], architecture: str) -> Mapping[str, str]:
    """GGUF name -> the one name that is renamed so; what two names are renamed to is nobody's."""
    table = _table(architecture, _blocks(names))
    pairs = [(table.get_name(name, (".weight", ".bias")), name) for name in names]
    times = Counter(found for found, _ in pairs)
    return {found: name for found, name in pairs if found is not None and times[found] == 1}


def _architecture(name: str, config: Mapping[str, Any]) -> str:
    """Under which architecture the names of a model are to be looked up."""
    problem = f"tensor {name!r} cannot be paired by name: one side is named as in a GGUF file"
    known = ARCHITECTURES.get(str(config.get("model_type")))
    if known is None:
        told = config.get("gguf", {}).get("general.architecture") or config.get("model_type")
        model = f"a model of type {told!r}" if told else "a model of unknown type"
        message = f"{problem}, and what llama.cpp makes of {model} is not known here"
        raise WrongInputError(message, hint="give checkpoints of one format, from before the conversion or after it")
    if EXPERTS.search(name):
        message = f"{problem}, where all experts of a layer are one tensor"
        raise WrongInputError(message, hint="give checkpoints of one format, from before the conversion or after it")
    return known


@lru_cache(maxsize=64)
def _blocks(names: tuple[str, ...]) -> int:
    """The number of blocks that names speak of."""
    return 1 + max((int(number) for name in names for number in BLOCK.findall(name)), default=0)


@lru_cache(maxsize=8)
def _table(architecture: str, blocks: int) -> Any:
    try:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    except ImportError as error:
        message = "tensors named as in a GGUF file can only be paired with the gguf library, which is not installed"
        raise WrongInputError(message, hint="pip install gguf") from error
    arch = next((key for key, value in MODEL_ARCH_NAMES.items() if value == architecture), None)
    if arch is None:
        message = f"the names of GGUF files of the architecture {architecture!r} are newer than the gguf library"
        raise WrongInputError(message, hint="pip install -U gguf")
    return get_tensor_name_map(arch, blocks)


LAYOUT = Layout(name="gguf-names", resolve=resolve, drops=drops)

"""What the metadata of a GGUF file says of the model, as a config.json would say it.

Only what the file states: no class name, for GGUF has none, and a model type only where llama.cpp's converter keeps the
names and shapes that transformers gives to a model of that type.

Source: llama.cpp, convert_hf_to_gguf.py, the `modify_tensors` of each architecture
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

MODEL_TYPES = ("llama", "granite", "smollm3", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "starcoder2")
"""Architectures whose tensors are those of transformers' model of the same name, renamed one by one."""

KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
ROTATED, NORM = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)"), re.compile(r"(.+_)?\w*norm\.weight")
CHANGES = {
    "llama": (ROTATED, "permuted"),
    "granite": (ROTATED, "permuted"),
    "smollm3": (ROTATED, "permuted"),
    "gemma": (NORM, "shifted"),
    "gemma2": (NORM, "shifted"),
}
"""Architecture -> tensors that the converter changes: rows put in the order of ggml's rotary embedding, or 1 added."""


def as_config(metadata: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    """The facts of a config.json; `gguf` holds the metadata itself, `gguf_changed` what the converter changed.

    tie_word_embeddings   False where the file holds an output head; where it holds none nothing is said, for a head
                          that was lost looks the same as one that is tied
    """
    names = tuple(names)
    architecture = metadata.get("general.architecture")
    config = {theirs: metadata[ours] for key, theirs in KEYS.items() if (ours := f"{architecture}.{key}") in metadata}
    if architecture in MODEL_TYPES:
        config["model_type"] = architecture
    if "output.weight" in names:
        config["tie_word_embeddings"] = False
    pattern, change = CHANGES.get(str(architecture), (None, ""))
    changed = {name: change for name in names if pattern and pattern.fullmatch(name)}
    return MappingProxyType(config | {"gguf": metadata, "gguf_changed": MappingProxyType(changed)})

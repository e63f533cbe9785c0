"""Query, key and value, or gate and up, lie in one tensor or in several.

vLLM, Phi-3 and many converters keep `qkv_proj` and `gate_up_proj`, rows one below the other in that order; Llama and
most others keep the parts. The sizes of the three parts are those that config.json tells; equal thirds are not assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_check.types import Layout, Link, TensorMeta

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def links(metas: Mapping[str, TensorMeta], config: Mapping[str, Any]) -> tuple[Link, ...]:
    """The parts are the parameters; of a file that has neither form there are none."""
    own = [part for parts in FUSED.values() for part in parts]
    found = tuple(link for meta in metas.values() for link in _cut(meta, config))
    whole = (Link(file=name, memory=name) for name in metas if name.split(".")[-2:-1] and name.split(".")[-2] in own)
    return (*found, *whole)


def _cut(meta: TensorMeta, config: Mapping[str, Any]) -> Iterator[Link]:
    module, _, leaf = meta.name.rpartition(".")
    path, _, last = module.rpartition(".")
    if last not in FUSED or leaf not in ("weight", "bias"):
        return
    sizes = _sizes(last, meta.shape[0], config)
    if sum(sizes) != meta.shape[0]:
        return
    start = 0
    for part, size in zip(FUSED[last], sizes, strict=False):
        yield Link(file=meta.name, memory=f"{path}.{part}.{leaf}", file_rows=(start, start + size))
        start += size


def _sizes(fused: str, rows: int, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Rows of each part; nothing, if the configuration does not tell."""
    if fused == "gate_up_proj":
        return (rows // 2, rows // 2)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return ()
    size = config.get("head_dim") or hidden // heads
    pairs = config.get("num_key_value_heads") or heads
    return (heads * size, pairs * size, pairs * size)


LAYOUT = Layout(name="fused-projections", links=links)

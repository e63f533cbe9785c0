"""torchtune: adapter_model.pt (once adapter_0.pt) in torchtune's own names, with PEFT's adapter_config.json beside it

    layers.<n>.attn.{q,k,v,output}_proj, layers.<n>.mlp.{w1,w2,w3}, output, tok_embeddings
            .lora_a.weight (r, in), .lora_b.weight (out, r), .magnitude (out,)

BASE may have these names, Meta's, or those of transformers. In Llama-like models torchtune and Meta rotate neighbours,
transformers the two halves of a head: over BASE in the names of transformers the rows of q and k go back to theirs.

Source: torchtune models/convert_weights.py hf_to_tune, tune_to_peft_adapter_weights; modules/peft/_utils.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.adapters.config import parse_config
from lora_check.dialects._shared import number, renamed, reordered
from lora_check.links import by_memory, lookup
from lora_check.types import Adapter, Checkpoint, Dialect, Part

ROLES = {"lora_a.weight": "A", "lora_b.weight": "B", "magnitude": "m"}
TRANSFORMERS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
META = {
    "attn.q_proj": "attention.wq",
    "attn.k_proj": "attention.wk",
    "attn.v_proj": "attention.wv",
    "attn.output_proj": "attention.wo",
    "mlp.w1": "feed_forward.w1",
    "mlp.w2": "feed_forward.w2",
    "mlp.w3": "feed_forward.w3",
}
ROTATED = {"attn.q_proj": "num_attention_heads", "attn.k_proj": "num_key_value_heads"}
NEIGHBOURS = ("gemma", "gemma2", "llama", "mistral")
HALVES = ("phi3", "qwen2", "qwen3")
"""transformers' model types whose q and k torchtune reorders, and those that it leaves as they are."""

_FACTOR = re.compile(rf"(?P<module>.+)\.(?P<leaf>{'|'.join(map(re.escape, ROLES))})")
_LAYER = re.compile(r"layers\.(?P<number>\d+)\.(?P<inner>.+)")


def recognises(config: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Factors whose names end in lora_a.weight and lora_b.weight."""
    return any(name.endswith((".lora_a.weight", ".lora_b.weight")) for name in names)


def read(raw: Mapping[str, Any], checkpoint: Checkpoint) -> Adapter:
    """Parse configuration and names; headers only.

    raises   AdapterConfigError: no r or no lora_alpha, or a value that cannot be
    """
    for key in ("r", "lora_alpha"):
        number(raw, key, checkpoint.location)
    config, parts, orphans = parse_config(raw, checkpoint.location), [], []
    for name in checkpoint.metas():
        match = _FACTOR.fullmatch(name)
        parts += [Part(tensor=name, module=match["module"], role=ROLES[match["leaf"]])] if match else []
        orphans += [] if match else [name]
    return Adapter(
        config=replace(config, targets=(), dora=any(part.role == "m" for part in parts), producer="torchtune"),
        checkpoint=checkpoint,
        dialect="torchtune",
        parts=tuple(parts),
        orphans=tuple(orphans),
    )


def bind(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Name the modules as BASE does, and give q and k the order of its rows."""
    own = [part.module for part in adapter.parts if f"{part.module}.weight" in base.metas()]
    if own:
        return adapter
    metas = base.metas()
    if any(_LAYER.fullmatch(name) and ".attention.wq." in name for name in metas):
        return renamed(adapter, lambda module: [name for name in [_in_meta(module)] if f"{name}.weight" in metas])
    rows = reordered(adapter, lambda module: _heads(module, base))
    return renamed(rows, lambda module: _in_transformers(module, base))


def _in_meta(module: str) -> str:
    layer = _LAYER.fullmatch(module)
    return f"layers.{layer['number']}.{META.get(layer['inner'], layer['inner'])}" if layer else module


def _in_transformers(module: str, base: Checkpoint) -> Sequence[str]:
    """The name in transformers; none, where BASE has no such parameter, or has it in other rows."""
    layer = _LAYER.fullmatch(module)
    inner = TRANSFORMERS.get(layer["inner"], layer["inner"]) if layer else ""
    plain = {"output": "lm_head", "tok_embeddings": "model.embed_tokens"}
    name = f"model.layers.{layer['number']}.{inner}" if layer else plain.get(module, module)
    known = lookup(f"{name}.weight", base.metas(), base.config) or f"{name}.weight" in by_memory(
        base.metas(), base.config
    )
    return [name] if known else []


def _heads(module: str, base: Checkpoint) -> int | str:
    """Over how many heads the rows of a module are reordered: 0, they are not; or why nobody can know."""
    layer, model = _LAYER.fullmatch(module), str(base.config.get("model_type") or "")
    key = ROTATED.get(layer["inner"], "") if layer else ""
    if not key or model in HALVES:
        return 0
    if model not in NEIGHBOURS:
        told = f"a model of type {model!r}" if model else "a model without a config.json"
        return f"whether torchtune reorders the rows of q and k of {told} is not known"
    heads = base.config.get(key) or base.config.get("num_attention_heads")
    return heads if isinstance(heads, int) and heads > 0 else f"{key} is not in the config.json of BASE"


DIALECT = Dialect(name="torchtune", recognises=recognises, read=read, bind=bind)

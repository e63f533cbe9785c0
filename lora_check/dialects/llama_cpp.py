"""llama.cpp: a GGUF file of type "adapter", whose tensors are named after the tensors of a GGUF model

    blk.<n>.attn_q.weight.lora_a (r, in), .lora_b (out, r)          token_embd.weight.lora_a (vocabulary, r)
    ....ffn_gate_exps.weight.lora_a (experts, r, in), .lora_b (experts, out, r)

s = alpha / r with `adapter.lora.alpha` and the r of the factors, 1 where alpha is 0. The converter gives the rows of q
and k the order that they have in the GGUF model; here they go back to their places, as those of a GGUF model do when it
is read. Vectors that the file carries beside the factors are not read by llama.cpp, and not used here.

Source: llama.cpp convert_lora_to_gguf.py, src/llama-adapter.cpp, tools/export-lora
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.dialects._experts import are_stacked, side_by_side
from lora_check.dialects._shared import Shape, embedded, modules_of, number, renamed, reordered, scales
from lora_check.links import lookup
from lora_check.types import FLOATS, Adapter, AdapterConfig, Checkpoint, Dialect, Part, View

ALPHA, TYPE, ARCHITECTURE = "adapter.lora.alpha", "adapter.type", "general.architecture"
ACTIVATED = "adapter.alora.invocation_tokens"
EMBEDDING = "token_embd"
ROTATED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
NEIGHBOURS = ("granite", "llama", "smollm3")
"""Architectures whose rows of q and k the converter reorders."""

_FACTOR = re.compile(r"(?P<module>.+)\.weight\.lora_(?P<role>[ab])")
_BLOCK = re.compile(r"blk\.(?P<number>\d+)\.(?P<inner>.+)")


def recognises(config: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Factors named after a weight."""
    return any(_FACTOR.fullmatch(name) for name in names)


def read(raw: Mapping[str, Any], checkpoint: Checkpoint) -> Adapter:
    """Parse the metadata of the file, and the names; headers only.

    raises   AdapterConfigError: no alpha
    """
    metadata: Mapping[str, Any] = checkpoint.config.get("gguf", {})
    alpha = number(metadata, ALPHA, checkpoint.location, "convert the adapter again with convert_lora_to_gguf.py")
    factors = {name: match for name in checkpoint.metas() if (match := _FACTOR.fullmatch(name))}
    kind = metadata.get(TYPE, "lora")
    plain = Adapter(
        config=AdapterConfig(
            method="LORA",
            rank=1,
            alpha=alpha,
            producer="llama.cpp",
            unsupported=(
                *((f"an adapter of type {kind!r} is not known to this version",) if kind != "lora" else ()),
                *(
                    ("an activated LoRA acts on some tokens only and cannot be merged",)
                    if ACTIVATED in metadata
                    else ()
                ),
            ),
        ),
        checkpoint=checkpoint,
        dialect="llama.cpp",
        parts=tuple(Part(tensor=name, module=one["module"], role=one["role"].upper()) for name, one in factors.items()),
        orphans=tuple(name for name in checkpoint.metas() if name not in factors),
    )
    return embedded(_laid_out(plain, alpha), lambda module: module == EMBEDDING)


def bind(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Name the modules as BASE does, and give q and k the order of transformers, in which a GGUF model is read too."""
    names = {module: lookup(f"{module}.weight", base.metas(), base.config) for module in modules_of(adapter)}
    found = {module: [name.removesuffix(".weight")] for module, name in names.items() if name}
    architecture = adapter.checkpoint.config["gguf"].get(ARCHITECTURE)
    rows = reordered(adapter, lambda module: _heads(module, architecture, base.config))
    return renamed(rows, lambda module: found.get(module, ()))


def _laid_out(adapter: Adapter, alpha: float) -> Adapter:
    """The factors as the recipes read them, and the scale of each module."""
    metas, parts = adapter.checkpoint.metas(), list[Part]()
    told, refused = dict[str, tuple[float, int]](), dict[str, str]()
    for module, roles in modules_of(adapter).items():
        shapes = {role: metas[part.tensor].shape for role, part in roles.items()}
        if {"A", "B"} <= roles.keys() and shapes["B"]:
            rank = shapes["B"][-1]
            told[module] = (alpha or float(rank), rank)
        strange = [dtype for part in roles.values() if (dtype := metas[part.tensor].dtype) not in FLOATS]
        refused |= {module: f"its factors are stored as {strange[0]}"} if strange else {}
        parts += [replace(part, view=_view(module, role, shapes)) for role, part in roles.items()]
    return replace(adapter, parts=tuple(parts), scales=scales(told), refused=refused)


def _view(module: str, role: str, shapes: Mapping[str, Shape]) -> View | None:
    a, b = shapes.get("A", ()), shapes.get("B", ())
    if len(a) == 3 and are_stacked(a, b):
        return side_by_side(a, b)[role]
    turned = module == EMBEDDING and role == "A" and len(a) == len(b) == 2 and a[1] == b[1]
    return View(transposed=True) if turned else None


def _heads(module: str, architecture: object, config: Mapping[str, Any]) -> int | str:
    """Over how many heads the converter reordered the rows of a module: 0, it did not; or why nobody can know."""
    block = _BLOCK.fullmatch(module)
    key = ROTATED.get(block["inner"], "") if block and architecture in NEIGHBOURS else ""
    heads = config.get(key) or config.get("num_attention_heads")
    if block and isinstance(heads, (list, tuple)):
        heads = heads[int(block["number"])] if int(block["number"]) < len(heads) else None
    if not key:
        return 0
    return heads if isinstance(heads, int) and heads > 0 else f"{key} is not in the config.json of BASE"


DIALECT = Dialect(name="llama.cpp", recognises=recognises, read=read, bind=bind, needs_config=False)

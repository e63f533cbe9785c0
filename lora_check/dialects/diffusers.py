"""diffusers: pytorch_lora_weights.safetensors, the factors of several parts of a pipeline in one file

    <part>.<module path>.lora_A.weight | lora_B.weight | lora_magnitude_vector | alpha
    <part>.<module path>.lora.down.weight, .lora_linear_layer.down.weight      2023
    [<part>.]<attention>.processor.to_q_lora.down.weight                       2023, the U-Net's without a part
            part: unet, transformer, text_encoder, text_encoder_2, text_encoder_3

s = alpha / r by the tensor `alpha`, or by `lora_adapter_metadata` in the header: a LoraConfig for each part. Where the
file tells neither, diffusers takes alpha = r of the first module for all: s is 1 if all have that r, and is left
undecided otherwise, for other tools take 1.

Source: diffusers loaders/lora_pipeline.py, utils/peft_utils.py get_peft_kwargs, utils/state_dict_utils.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_check.adapters.config import changes_base, parse_config
from lora_check.adapters.scale import scale_in
from lora_check.dialects._components import modules_in
from lora_check.dialects._shared import laid_over, modules_of, renamed, rows, scales, single
from lora_check.errors import AdapterConfigError
from lora_check.types import Adapter, AdapterConfig, Checkpoint, Dialect, Part, Scale

METADATA = "lora_adapter_metadata"
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
ROLES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "m",
    "alpha": "alpha",
}
_OLD = r"(?:lora|lora_linear_layer)\.(?:down|up)\.weight"
_PROCESSOR = r"to_(?:q|k|v|out)_lora\.(?:down|up)\.weight"
_LEAF = re.compile(rf"(?P<module>.+)\.(?P<leaf>{'|'.join(map(re.escape, ROLES))}|{_OLD}|{_PROCESSOR})(?:\.weight)?")
_SURE = re.compile(
    r"(?:unet|text_encoder(?:_[23])?)\..+|transformer\.(?:\w*transformer_blocks\.|blocks\.\d+\.attn[12]\.).+"
)
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def recognises(config: Mapping[str, Any], names: Sequence[str]) -> bool:
    """The names of 2023, or those of PEFT under a part of a pipeline, and no configuration of PEFT's."""
    if "peft_type" in config:
        return False
    leaves = [(name, match["leaf"]) for name in names if (match := _LEAF.fullmatch(name))]
    return any(leaf not in ROLES or (leaf != "alpha" and _SURE.fullmatch(name)) for name, leaf in leaves)


def read(raw: Mapping[str, Any], checkpoint: Checkpoint) -> Adapter:
    """Parse names, alphas and the metadata of the header.

    raises   AdapterConfigError: metadata or an alpha that cannot be
    """
    read_as = {name: _part(name) for name in checkpoint.metas()}
    configs = _configs(checkpoint)
    adapter = Adapter(
        config=_joined(tuple(configs.values())),
        checkpoint=checkpoint,
        dialect="diffusers",
        parts=tuple(part for part in read_as.values() if part and part.role != "alpha"),
        orphans=tuple(name for name, part in read_as.items() if part is None),
    )
    roles = {part.role for part in adapter.parts}
    config = replace(adapter.config, dora="m" in roles, lora_bias="bias" in roles)
    alphas = {part.module: part.tensor for part in read_as.values() if part and part.role == "alpha"}
    return _scaled(replace(adapter, config=config), alphas, configs)


def bind(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Find each part of the pipeline in BASE, which may be that part alone."""
    known = {part: modules_in(base, part) for part in PARTS}

    def found(module: str) -> Sequence[str]:
        """The modules of BASE that a module of a part is."""
        part, _, path = module.partition(".")
        return known[part].get(path, ()) if part in known else ()

    shapes = {name.removesuffix(".weight"): meta.shape for name, meta in base.metas().items()}
    return laid_over(renamed(adapter, found), shapes)


def _part(name: str) -> Part | None:
    """One tensor; the names of 2023 say `down` for A and `up` for B."""
    match = _LEAF.fullmatch(name)
    if match is None:
        return None
    module, leaf = match["module"].removesuffix(".processor"), match["leaf"]
    if module.partition(".")[0] not in PARTS:
        module = f"unet.{module}"
    if leaf in ROLES:
        return Part(tensor=name, module=module, role=ROLES[leaf])
    layer = leaf.partition("_lora.")[0]
    if layer in _TEXT:
        inner = _TEXT[layer] if module.startswith("text_encoder") else layer.replace("to_out", "to_out.0")
        module = f"{module}.{inner}"
    return Part(tensor=name, module=module, role="A" if ".down." in leaf else "B")


def _configs(checkpoint: Checkpoint) -> dict[str, AdapterConfig]:
    """Part of the pipeline -> its configuration, as the header keeps it."""
    metadata: Mapping[str, str] = getattr(checkpoint, "metadata", {})
    text = metadata.get(METADATA)
    if not text:
        return {}
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        message = f"adapter: {METADATA} in the header of {checkpoint.location} is no JSON object"
        raise AdapterConfigError(message, hint="write the file again with save_lora_weights")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = value
    return {part: parse_config(raw, checkpoint.location) for part, raw in parts.items()}


def _joined(configs: Sequence[AdapterConfig]) -> AdapterConfig:
    """One configuration for all parts; what each says of its scales is kept by module."""
    plain = AdapterConfig(method="LORA", rank=1, alpha=1, producer="diffusers")
    reasons = dict.fromkeys(reason for one in configs for reason in one.unsupported)
    decomposed = [f"init_lora_weights={one.raw['init_lora_weights']!r}" for one in configs if changes_base(one.raw)]
    other = [f"a part of the pipeline has an adapter of type {one.method}" for one in configs if one.method != "LORA"]
    return replace(plain, unsupported=(*reasons, *decomposed, *other))


def _scaled(adapter: Adapter, alphas: Mapping[str, str], configs: Mapping[str, AdapterConfig]) -> Adapter:
    """The scale of each module, or why nobody can know it.

    alphas   module -> the tensor that holds its alpha
    """
    metas = adapter.checkpoint.metas()
    ranks = {
        module: rows(metas[parts["A"].tensor].shape) for module, parts in modules_of(adapter).items() if "A" in parts
    }
    read = {module: single(adapter.checkpoint, tensor) for module, tensor in alphas.items()}
    told = scales({module: (read.get(module, float(rank)), rank) for module, rank in ranks.items()})
    refused: dict[str, str] = {}
    for module, rank in ranks.items():
        part, _, path = module.partition(".")
        if part in configs:
            told[module] = scale_in(configs[part], path)
        reason = _contradiction(told[module], rank, part in configs and module in alphas)
        if part not in configs and module not in alphas and len({ranks[one] for one in _within(part, ranks)}) > 1:
            reason = "the file tells no alpha, its modules differ in r, and tools differ in what they make of that"
        refused |= {module: reason} if reason else {}
    lone = tuple(tensor for module, tensor in alphas.items() if module not in ranks)
    return replace(adapter, scales=told, refused=refused, orphans=(*adapter.orphans, *lone))


def _contradiction(said: Scale, rank: int, twice: bool) -> str:
    if twice:
        return f"{METADATA} and a tensor alpha both tell its scale"
    return f"the header says r = {said.rank}, lora_A has {rank} rows" if said.rank != rank else ""


def _within(part: str, modules: Iterable[str]) -> list[str]:
    return [one for one in modules if one.startswith(f"{part}.")]


DIALECT = Dialect(name="diffusers", recognises=recognises, read=read, bind=bind, needs_config=False)

"""The parts of a diffusion model: where U-Net, transformer and text encoders lie in a file, and under which names.

A file is one part alone, a pipeline with one prefix for each, or a single file in the names of CompVis and Stability
AI, whose U-Net counts its layers through: input_blocks.1 is down_blocks.0, first layer.

Source: diffusers scripts/convert_original_stable_diffusion_to_diffusers.py; sd-scripts library/model_util.py and
library/sdxl_model_util.py
"""

from __future__ import annotations

import re

from lora_check.types import Checkpoint

_NETWORK = ("", "unet.", "transformer.", "model.diffusion_model.", "diffusion_model.")
_CLIP = ("", "text_encoder.", "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
PREFIXES = {
    "": ("",),
    "unet": _NETWORK,
    "transformer": _NETWORK,
    "te": _CLIP,
    "te1": _CLIP,
    "te2": ("", "text_encoder_2."),
    "te3": ("", "text_encoder_3."),
    "text_encoder": _CLIP,
    "text_encoder_2": ("", "text_encoder_2."),
    "text_encoder_3": ("", "text_encoder_3."),
}
"""The part of the model, as kohya and diffusers call it -> what may stand before its names in a file."""

_BLOCK = re.compile(r"(?P<side>input|output|middle)_blocks?\.(?P<place>\d+(?:\.\d+)?)\.(?P<rest>.+)")
_SINGLE = {
    "input_blocks.0.0": "conv_in",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
}
_RESNET = {
    "emb_layers.1": "time_emb_proj",
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_LAYERS = 3
"""Layers of a block: two residual ones and a downsampler, or three residual ones."""


def modules_in(base: Checkpoint, part: str) -> dict[str, list[str]]:
    """Name of a module inside one part of the model, in diffusers' words too -> the modules of BASE that it may be."""
    found: dict[str, list[str]] = {}
    for name, meta in base.metas().items():
        module = name.removesuffix(".weight")
        if module == name or len(meta.shape) < 2:
            continue
        inner = {module.removeprefix(prefix) for prefix in PREFIXES[part] if module.startswith(prefix)}
        for one in inner | {diffusers_name(one) for one in inner}:
            found.setdefault(one, []).append(module)
    return found


def diffusers_name(module: str) -> str:
    """The name that diffusers gives to a module of a U-Net; one that is no such module keeps its own."""
    block = _BLOCK.fullmatch(module)
    if module in _SINGLE or block is None:
        return _SINGLE.get(module, module)
    numbers = [int(one) for one in block["place"].split(".")]
    if block["side"] == "middle":
        return _middle(module, numbers[0], block["rest"])
    if len(numbers) < 2:
        return module
    down = block["side"] == "input"
    index, layer = divmod(numbers[0] - (1 if down else 0), _LAYERS)
    stage = f"{'down' if down else 'up'}_blocks.{index}"
    if block["rest"] == ("op" if down else "conv"):
        return f"{stage}.{'down' if down else 'up'}samplers.0.conv"
    return _layer(module, f"{stage}.", layer, numbers[1], block["rest"])


def _middle(module: str, place: int, rest: str) -> str:
    return _layer(module, "mid_block.", place // 2, place % 2, rest)


def _layer(module: str, stage: str, index: int, kind: int, rest: str) -> str:
    """A residual layer (kind 0), whose parts are renamed, or an attention (kind 1), whose parts are not."""
    if kind == 0:
        return f"{stage}resnets.{index}.{_RESNET[rest]}" if rest in _RESNET else module
    return f"{stage}attentions.{index}.{rest}" if kind == 1 else module

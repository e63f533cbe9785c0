"""fp8 with scales: DeepSeek's blocks of 128 x 128, one scale a tensor, or one a row.

Beside X, float8_e4m3fn or float8_e5m2, lies X_scale_inv or X_scale: one number, one for each row, or one for each block
of a matrix. Either is what a code is multiplied by, in float32. X's module may have an input_scale beside it, which the
activations are divided by and the weight is not.

The size of the blocks is that of `weight_block_size` in the configuration where it says one, else the number of scales
tells it: 128 where they come out so, else as many equal parts. Scales of one byte are powers of two.

The scale of a block is its largest modulus by the largest code, or a power of two above that, or what it was in BASE;
tools that calibrate choose others.

Source: DeepSeek-V3, section 3.3.2 and inference/fp8_cast_bf16.py; transformers.integrations.finegrained_fp8;
https://github.com/neuralmagic/compressed-tensors (float-quantized)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_check.sources import Lines
from lora_check.types import Checkpoint, Coded, Grid, Quantisation, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("float8_e4m3fn", "float8_e5m2")
ENDS = ("_scale_inv", "_scale")
RIDERS = ("input_scale", "activation_scale", "weight_scale_ub")
NARROW = ("bfloat16", "float16")
POWERS = ("uint8", "float8_e8m0fnu")
BLOCK = 128


def find(checkpoint: Checkpoint) -> list[Coded]:
    """Every fp8 tensor with a scale beside it."""
    metas = checkpoint.metas()
    return [
        _coded(name, f"{name}{end}", checkpoint)
        for name, meta in metas.items()
        if meta.dtype in DTYPES
        for end in [next((end for end in ENDS if f"{name}{end}" in metas), None)]
        if end
    ]


def decode(coded: Coded, checkpoint: Checkpoint) -> Lines:
    """code times scale in float32, in the dtype of the scales if that is narrower."""
    import torch

    codes, scales = (one.reshape(-1, one.shape[-1]) for one in _read(coded, checkpoint))
    levels = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    codes = codes.view(torch.uint8)
    (height, width), dtype = coded.facts["block"], getattr(torch, coded.meta.dtype)
    rows, columns = coded.meta.shape[-2:]

    def make(lines: slice) -> Tensor:
        places = torch.arange(lines.start, lines.stop)
        blocks = places // rows * -(-rows // height) + places % rows // height
        numbers = levels.index_select(0, codes[lines].flatten().int()).view(-1, columns)
        factors = scales[blocks]
        if columns % width:
            numbers *= factors.repeat_interleave(width, -1)[:, :columns]
        else:
            numbers.view(len(numbers), -1, width).mul_(factors[..., None])
        return numbers.to(dtype)

    return Lines(shape=coded.meta.shape, dtype=dtype, make=make)


def grid(coded: Coded, checkpoint: Checkpoint, base: tuple[Coded, Checkpoint] | None) -> Grid:
    """The cells of fp8, over the blocks; what is quantised may be in float32 or in a 16-bit dtype."""
    import torch

    from lora_check.grids import Rectangles, Stated, U, cells
    from lora_check.rounding import gamma, unit

    codes, scales = _read(coded, checkpoint)
    levels = torch.arange(256, dtype=torch.uint8).view(codes.dtype).double()
    # The reciprocal of the scale, its reciprocal and the product are each off by u; the quotient may be kept in bf16.
    least, largest = cells(levels, relative=gamma(4, U) + unit("bfloat16"), absolute=0.0)
    (height, width), columns = coded.facts["block"], coded.meta.shape[-1]
    before = _read(*base)[1] if base and base[0].facts == coded.facts else None
    return Grid(
        codes=codes.contiguous().view(torch.uint8).reshape(-1, columns),
        levels=levels,
        least=least,
        largest=largest,
        blocks=Rectangles(rows=coded.meta.numel // columns, columns=columns, height=height, width=width),
        scales=Stated(
            stored=scales.flatten().double(),
            top=levels[levels.isfinite()].max().item(),
            storage=coded.facts["scales"],
            base=before.flatten().double() if before is not None else None,
        ),
        dtypes=tuple(dict.fromkeys((coded.meta.dtype, "float32", *NARROW))),
        anew=("float32", *NARROW),
    )


def _coded(name: str, scale: str, checkpoint: Checkpoint) -> Coded:
    metas = checkpoint.metas()
    meta, label = metas[name], f"scaled {metas[name].dtype}"
    block = _block(meta.shape, metas[scale].shape, _said(checkpoint.config))
    dtype = metas[scale].dtype if metas[scale].dtype in NARROW else "float32"
    sealed = "" if block else f"and {scale} of shape {metas[scale].shape} does not divide it into blocks"
    module = name.removesuffix("weight")
    return Coded(
        meta=TensorMeta(name=name, shape=meta.shape, dtype=label if sealed else dtype, codes=label, sealed=sealed),
        parts={"codes": name, "scale": scale},
        riders=tuple(rider for role in RIDERS if name.endswith("weight") and (rider := f"{module}{role}") in metas),
        facts={"block": block, "scales": metas[scale].dtype},
    )


def _said(config: Mapping[str, Any]) -> tuple[int, int]:
    """The size of blocks that the configuration says, or DeepSeek's."""
    said = (config.get("quantization_config") or {}).get("weight_block_size")
    if isinstance(said, (list, tuple)) and len(said) == 2 and all(type(one) is int and one > 0 for one in said):
        return said[0], said[1]
    return BLOCK, BLOCK


def _block(shape: tuple[int, ...], scales: tuple[int, ...], said: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the shapes do not tell."""
    if len(shape) < 2:
        return None
    rows, columns = shape[-2:]
    if scales == tuple(1 for _ in scales):
        return (rows, columns) if len(shape) == 2 else None
    if scales in ((*shape[:-1], 1), shape[:-1]):
        return 1, columns
    if len(scales) != len(shape) or scales[:-2] != shape[:-2]:
        return None
    if scales[-2:] == (-(-rows // said[0]), -(-columns // said[1])) and (len(shape) == 2 or rows % said[0] == 0):
        return said
    whole = rows % scales[-2] == 0 and columns % scales[-1] == 0
    return (rows // scales[-2], columns // scales[-1]) if whole else None


def _read(coded: Coded, checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """The codes, and the scales in float32 as a matrix of them for each matrix of codes."""
    import torch

    codes, scales = (checkpoint.read(coded.parts[role]) for role in ("codes", "scale"))
    numbers = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    height, width = coded.facts["block"]
    rows, columns = coded.meta.shape[-2:]
    return codes, numbers.reshape(*coded.meta.shape[:-2], -(-rows // height), -(-columns // width))


QUANTISATION = Quantisation(name="fp8-scaled", find=find, decode=decode, grid=grid)

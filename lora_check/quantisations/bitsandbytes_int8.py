"""bitsandbytes 8-bit: LLM.int8().

X.weight is int8, X.SCB beside it holds the largest modulus of each row, float32, and X.weight_format says in which
order the rows lie: 0, as they are. What is quantised is rounded to fp16 first. A number is (code times SCB) times
7.874015718698502e-3, which is 1/127, in float32.

Source: Dettmers et al. 2022, "LLM.int8()", section 3; bitsandbytes.functional: int8_vectorwise_quant,
int8_vectorwise_dequant; bitsandbytes.nn.Int8Params
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_check.dequantised import INT8_LAST as LAST
from lora_check.dequantised import INT8_STEP as STEP
from lora_check.sources import Lines
from lora_check.types import Checkpoint, Coded, Grid, Quantisation, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

NAME = "bitsandbytes int8"


def find(checkpoint: Checkpoint) -> list[Coded]:
    """Every int8 weight with an SCB beside it."""
    metas = checkpoint.metas()
    pairs = [(name, f"{name.removesuffix('weight')}SCB") for name, meta in metas.items() if meta.dtype == "int8"]
    return [_coded(name, scales, checkpoint) for name, scales in pairs if name.endswith("weight") and scales in metas]


def decode(coded: Coded, checkpoint: Checkpoint) -> Lines:
    """(code times SCB) times 1/127, in this order, float32."""
    import torch

    codes, scales = (checkpoint.read(coded.parts[role]) for role in ("codes", "SCB"))

    def make(rows: slice) -> Tensor:
        numbers: Tensor = codes[rows].float() * scales.flatten()[rows, None] * STEP
        return numbers

    return Lines(shape=coded.meta.shape, dtype=torch.float32, make=make)


def grid(coded: Coded, checkpoint: Checkpoint, base: tuple[Coded, Checkpoint] | None) -> Grid:
    """The cells of 255 equal steps, over rows; what is quantised is in fp16."""
    import torch

    from lora_check.grids import Maxima, Rectangles, U, cells
    from lora_check.rounding import gamma

    codes, scales = (checkpoint.read(coded.parts[role]) for role in ("codes", "SCB"))
    rows, columns = coded.meta.shape
    levels = torch.arange(256, dtype=torch.uint8).view(torch.int8).double()
    # 127 / SCB may be off by 2 u, and the product with it by u, of numbers up to 127.
    least, largest = cells(levels, relative=0.0, absolute=LAST * gamma(3, U), top=LAST + 0.5)
    return Grid(
        codes=codes.contiguous().view(torch.uint8),
        levels=levels / LAST,
        least=least / LAST,
        largest=largest / LAST,
        blocks=Rectangles(rows=rows, columns=columns, height=1, width=columns),
        scales=Maxima(stored=scales.flatten().double()),
        dtypes=("float16",),
        anew=("float16",),
    )


def _coded(name: str, scales: str, checkpoint: Checkpoint) -> Coded:
    metas, order = checkpoint.metas(), f"{name}_format"
    sealed = ""
    if len(metas[name].shape) != 2 or metas[scales].numel != metas[name].shape[0]:
        sealed = f"and {scales} does not hold one scale for each of its rows"
    elif order in metas and checkpoint.read(order).flatten().tolist() != [0]:
        sealed = "in an order of rows that belongs to one kind of GPU"
    dtype = NAME if sealed else "float32"
    meta = TensorMeta(name=name, shape=metas[name].shape, dtype=dtype, codes=NAME, sealed=sealed)
    parts = {"codes": name, "SCB": scales} | ({"order": order} if order in metas else {})
    return Coded(meta=meta, parts=parts)


QUANTISATION = Quantisation(name="bitsandbytes-int8", find=find, decode=decode, grid=grid)

"""What a weight is once a library has quantised it and decoded it again, rows by rows.

bitsandbytes counts blocks of 64 through the flattened weight: x times 1 / absmax in float32, the nearest level, a
number midway to the lower one; then level times absmax in float32, rounded to the dtype of the model. LLM.int8() rounds
to fp16 first and divides each row by its largest modulus.

A quotient of two bf16 numbers lies no nearer than 19 u to a middle between two levels of nf4, u that of float32, so
that every device makes the same of bf16 weights. Of other dtypes, or levels, one that computes quotients in another way
may take the neighbouring level for a number that lies midway.

Source: Dettmers et al. 2023, "QLoRA", section 3 and appendix E; Dettmers et al. 2022, "LLM.int8()", section 3;
bitsandbytes.functional: quantize_4bit, dequantize_4bit, int8_vectorwise_quant, int8_vectorwise_dequant
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 64
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""QLoRA, appendix E."""

FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""Sign, two bits of exponent, one of mantissa: the levels without a sign, of which the largest is to be 1."""

TABLES = {"nf4": NF4, "fp4": tuple(sign * level / 12 for sign in (1, -1) for level in FP4)}
"""Level by code, in units of the largest modulus of the block."""

INT8_LAST = 127
INT8_STEP = 7.874015718698502e-3
"""1/127, as bitsandbytes writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of a matrix that are computed when they are asked for: nothing of it is held.

    shape   (rows, columns)        dtype   of every row
    make    a range of rows -> those rows, in that dtype
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    make: Callable[[slice], Tensor]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.make(slice(*rows.indices(self.shape[0])[:2]))

    def contiguous(self) -> Tensor:
        """All rows at once, for who compares the whole."""
        return self[:]


def decoded(weight: Tensor, scheme: str, dtype: torch.dtype) -> Rows:
    """A weight held in `dtype`, quantised by bitsandbytes and decoded to `dtype` again.

    weight   (rows, columns), floating        scheme   "nf4", "fp4" or "int8"
    """
    make = _int8 if scheme == "int8" else _in_blocks(scheme)
    return Rows(shape=(len(weight), weight.shape[1]), dtype=dtype, make=lambda rows: make(weight, rows, dtype))


def as_numbers(codes: Tensor, dtype: torch.dtype) -> Rows:
    """Codes taken for the numbers themselves, (rows, columns)."""
    return Rows(shape=(len(codes), codes.shape[1]), dtype=dtype, make=lambda rows: codes[rows].to(dtype))


def _in_blocks(scheme: str) -> Callable[[Tensor, slice, torch.dtype], Tensor]:
    """Rows of blocks that may begin and end within a row."""

    def make(weight: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        columns, count = weight.shape[1], weight.numel()
        first = rows.start * columns // BLOCK * BLOCK
        last = min(-(-rows.stop * columns // BLOCK) * BLOCK, count)
        upper = first // columns
        flat = weight[upper : -(-last // columns)].to(dtype).float().reshape(-1)
        flat = flat[first - upper * columns : last - upper * columns]
        begin = rows.start * columns - first
        kept = _blocks(flat, scheme)[begin : begin + (rows.stop - rows.start) * columns]
        return kept.to(dtype).reshape(-1, columns)

    return make


def _blocks(flat: Tensor, scheme: str) -> Tensor:
    """Whole blocks, the last of which may be short: level times the largest modulus, float32."""
    import torch

    from lora_check.grids import SMALLEST

    short = -len(flat) % BLOCK
    blocks = torch.nn.functional.pad(flat, (0, short)).reshape(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    quotients = (blocks * (1.0 / largest.clamp(min=SMALLEST))).clamp(-1, 1)
    if short:  # a short block is divided, and not multiplied by the reciprocal
        largest[-1] = largest[-1].clamp(min=SMALLEST)
        quotients[-1] = (blocks[-1] / largest[-1]).clamp(-1, 1)
    levels, middles = _levels(scheme)
    return (levels[torch.bucketize(quotients, middles)] * largest).reshape(-1)[: len(flat)]


@cache
def _levels(scheme: str) -> tuple[Tensor, Tensor]:
    """The levels in their order, and the middles between them."""
    import torch

    levels = torch.tensor(TABLES[scheme], dtype=torch.float32).sort().values
    return levels, (levels[1:] + levels[:-1]) / 2


def _int8(weight: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """(code times the row's largest modulus) times 1 / 127, in this order."""
    import torch

    numbers = weight[rows].to(dtype).to(torch.float16).float()
    largest = numbers.abs().amax(1, keepdim=True)
    codes = torch.round(numbers * (INT8_LAST / largest)).nan_to_num(0.0)
    return (codes * largest * INT8_STEP).to(dtype)

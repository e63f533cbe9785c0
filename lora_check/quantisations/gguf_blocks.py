"""gguf: tensors in the block formats of llama.cpp, and those that its converter reordered.

The numbers of a quantised tensor are those that the gguf library decodes, float32. What llama.cpp calls permuted has
its rows put back into the order of transformers, quantised or not; what it shifted stays as it is, for 1 cannot be
taken off a rounded sum without a loss.

Source: gguf.quants.dequantize; llama.cpp convert_hf_to_gguf.py, LlamaModel.permute
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_check.sources import Lines
from lora_check.types import Checkpoint, Coded, Quantisation, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS, UNKNOWN, PERMUTED = "gguf-", "gguf-type-", "-permuted"


def find(checkpoint: Checkpoint) -> list[Coded]:
    """Every tensor that is stored in blocks, and every one whose rows the converter reordered."""
    return [_coded(meta) for meta in checkpoint.metas().values() if _known(meta.dtype)]


def decode(coded: Coded, checkpoint: Checkpoint) -> Lines:
    """The numbers of the blocks; rows in the order of the file.

    raises   UnknownFormatError: the gguf library cannot undo this type
    """
    import torch

    source: Any = checkpoint
    while not hasattr(source, "dequantised"):
        source = source.inner
    shape, name = coded.meta.shape, coded.meta.name
    columns = shape[-1] if len(shape) > 1 else 1

    def make(lines: slice) -> Tensor:
        numbers: Tensor = source.dequantised(name, lines)
        return numbers.reshape(-1, columns)

    # The blocks of a vector lie along its only row.
    unit = shape[0] if coded.meta.codes and len(shape) == 1 else 1
    return Lines(shape=shape, dtype=getattr(torch, coded.meta.dtype), make=make, unit=unit)


def _known(dtype: str) -> bool:
    return dtype.endswith(PERMUTED) or (dtype.startswith(BLOCKS) and not dtype.startswith(UNKNOWN))


def _coded(meta: TensorMeta) -> Coded:
    if meta.dtype.endswith(PERMUTED):
        seen = replace(meta, dtype=meta.dtype.removesuffix(PERMUTED))
    else:
        seen = replace(meta, dtype="float32", codes=meta.dtype, packed=meta.nbytes)
    return Coded(meta=seen, parts={"codes": meta.name})


QUANTISATION = Quantisation(name="gguf", find=find, decode=decode)

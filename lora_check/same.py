"""Whether bytes are the same, and where they are not: at the speed of memory, and without a copy."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_LIBRARY = ctypes.CDLL("msvcrt" if os.name == "nt" else None)
_LIBRARY.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_LIBRARY.memcmp.restype = ctypes.c_int

WINDOW_ELEMENTS = 1 << 13
"""Elements that are compared before it is asked where among them two tensors differ."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes; stops at the first that differ."""
    one, other = one.contiguous(), other.contiguous()
    if one.is_cpu and other.is_cpu:
        return not _LIBRARY.memcmp(one.data_ptr(), other.data_ptr(), one.numel() * one.element_size())
    return torch.equal(_words(one.reshape(-1)), _words(other.reshape(-1)))


def differing(one: Tensor, other: Tensor) -> int:
    """In how many elements two tensors of one shape and dtype differ, bit by bit."""
    pair = one.contiguous().reshape(-1), other.contiguous().reshape(-1)
    return int((_words(pair[0]) != _words(pair[1])).sum().item())


def apart(one: Tensor, other: Tensor) -> Tensor:
    """The places, counted through all rows, where two contiguous tensors of one shape and float dtype differ; int64.

    Few are expected to: whole windows are compared before their elements are.
    """
    (left, right), (begin, other_begin), size = (
        (_array(one).reshape(-1), _array(other).reshape(-1)),
        (one.data_ptr(), other.data_ptr()),
        one.element_size(),
    )
    found = [np.empty(0, dtype=np.int64)]
    for start in range(0, left.size, WINDOW_ELEMENTS):
        near, byte = slice(start, min(start + WINDOW_ELEMENTS, left.size)), start * size
        if _LIBRARY.memcmp(begin + byte, other_begin + byte, (near.stop - start) * size):
            found.append(start + np.flatnonzero(left[near] != right[near]))
    return torch.from_numpy(np.concatenate(found))


class Chunk(NamedTuple):
    """Neighbours among the elements of two tensors, and what of them is not as it should be."""

    start: int
    stop: int
    same: bool
    finite: bool
    zero: bool


def suspicious(one: Tensor, other: Tensor, elements: int, *, zeros: bool) -> Iterator[Chunk]:
    """The chunks of two contiguous float tensors of one shape and dtype that differ, or of which `other` is not finite.

    zeros   those too in which `other` has a zero, of either sign

    Every number of a model passes here, so no tensor is made on the way, and the bytes come first: both are then read
    from memory at once, and looked at again in the cache. Read as integers, the numbers of one sign keep their order of
    size, and what is not finite comes last.
    """
    bits, infinity = _array(other).reshape(-1), _INFINITY[other.dtype]
    plain, sign, size = bits.view(f"u{bits.itemsize}"), 1 << (8 * bits.itemsize - 1), bits.itemsize
    begin, other_begin = one.data_ptr(), other.data_ptr()
    for start in range(0, bits.size, elements):
        stop = min(start + elements, bits.size)
        same = not _LIBRARY.memcmp(begin + start * size, other_begin + start * size, (stop - start) * size)
        some, unsigned = bits[start:stop], plain[start:stop]
        finite = some.max() < infinity and unsigned.max() < sign + infinity
        zero = zeros and (unsigned.min() == 0 or some.min() == -sign)
        if not same or not finite or zero:
            yield Chunk(start, stop, same, bool(finite), bool(zero))


def least_size(x: Tensor) -> float:
    """The smallest |x| of a float tensor that is not zero; 1 if all are.

    Without its sign, and less one, zero is the largest of all.
    """
    bits = _array(x.contiguous())
    kind = np.dtype(f"u{bits.itemsize}").type
    sizes = (bits.view(kind) << kind(1)) - kind(2)
    least = (int(sizes.min()) + 2) % (1 << 8 * bits.itemsize) >> 1 if sizes.size else 0
    return float(torch.from_numpy(np.array([least], dtype=bits.dtype)).view(x.dtype)) or 1.0


def _array(x: Tensor) -> Any:
    return x.view(_INTEGERS[x.element_size()]).numpy()


def _words(flat: Tensor) -> Tensor:
    """The bytes of a flat tensor as integers, one for each element."""
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()])

"""bitsandbytes 4-bit: nf4 and fp4, with and without double quantisation.

Beside X.weight, two codes to a byte, the first in the upper half, lie X.weight.absmax, one scale for each block of the
flattened weight, X.weight.quant_map, the sixteen levels, and X.weight.quant_state.bitsandbytes__nf4 or ...__fp4: JSON,
a byte to each element, with shape, dtype and block size. With double quantisation absmax is itself in codes: its mean,
`nested_offset`, is taken off, and nested_absmax and nested_quant_map are scales and levels of what is left.

A number is level times scale in float32, rounded to the dtype of the header. bitsandbytes itself takes the levels from
the name of the scheme and not from the file, so a file whose levels are others is refused.

Source: Dettmers et al. 2023, "QLoRA", section 3 and appendix E; bitsandbytes.functional: QuantState.from_dict,
dequantize_4bit, create_dynamic_map
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_check.dequantised import TABLES
from lora_check.errors import CorruptCheckpointError
from lora_check.sources import Lines
from lora_check.types import FLOATS, Checkpoint, Coded, Grid, Quantisation, Scales, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

TOLD, TOLD_OF_NESTED = ("shape", "blocksize", "dtype"), ("nested_blocksize", "nested_offset")
HEADER = ".quant_state.bitsandbytes__"
NESTED = ("nested_absmax", "nested_quant_map")
MIXED = "download the file again, or save the model again with bitsandbytes"


def find(checkpoint: Checkpoint) -> list[Coded]:
    """Every weight that has a header beside it."""
    metas = checkpoint.metas()
    return [_coded(name, checkpoint) for name in metas if HEADER in name and name.partition(HEADER)[0] in metas]


def decode(coded: Coded, checkpoint: Checkpoint) -> Lines:
    """level times scale in float32, in the dtype of the header.

    raises   CorruptCheckpointError: the levels are not those of the scheme
    """
    import torch

    parts, size = _read(coded, checkpoint), coded.facts["blocksize"]
    dtype, shape = getattr(torch, coded.meta.dtype), coded.meta.shape
    pairs, packed = _pairs(_levels(coded, parts)), _bytes(parts["codes"])
    columns = shape[-1] if len(shape) > 1 else 1

    def make(lines: slice) -> Tensor:
        first, last = lines.start * columns, lines.stop * columns
        blocks = slice(first // size, -(-last // size))
        begin, end = blocks.start * size, min(blocks.stop * size, coded.meta.numel)
        scales = _scales(parts, coded.facts, blocks)
        numbers = pairs.index_select(0, packed[begin // 2 : -(-end // 2)].int()).flatten()[begin % 2 :][: end - begin]
        if (end - begin) % size:
            numbers *= scales.repeat_interleave(size)[: end - begin]
        else:
            numbers.view(-1, size).mul_(scales[:, None])
        return numbers[first - begin : last - begin].to(dtype).reshape(-1, columns)

    return Lines(shape=shape, dtype=dtype, make=make)


def grid(coded: Coded, checkpoint: Checkpoint, base: tuple[Coded, Checkpoint] | None) -> Grid:
    """The cells of the sixteen levels, over blocks of the flattened weight, of numbers in the dtype of the header."""
    from lora_check.grids import Runs, U, cells
    from lora_check.rounding import gamma

    parts, facts = _read(coded, checkpoint), coded.facts
    levels = _levels(coded, parts).double()
    # 1 / scale, the product with it and the comparison with a middle are each off by u, of numbers up to 1.
    least, largest = cells(levels, relative=0.0, absolute=gamma(4, U), top=1.0)
    rows, columns = coded.meta.numel // coded.meta.shape[-1], coded.meta.shape[-1]
    return Grid(
        codes=_codes(_bytes(parts["codes"]), rows, columns),
        levels=levels,
        least=least,
        largest=largest,
        blocks=Runs(rows=rows, columns=columns, size=facts["blocksize"]),
        scales=_judges(coded, parts),
        dtypes=(coded.meta.dtype,),
        anew=("float32", "bfloat16", "float16"),
    )


# ----------------------------------------------------------------------------------------------------- headers


def _coded(header: str, checkpoint: Checkpoint) -> Coded:
    metas = checkpoint.metas()
    weight, _, kind = header.partition(HEADER)
    facts = _facts(header, checkpoint)
    roles = ["absmax", "quant_map", *(role for role in NESTED if f"{weight}.{role}" in metas)]
    parts = {"codes": weight, "header": header} | {role: f"{weight}.{role}" for role in roles}
    meta = TensorMeta(name=weight, shape=tuple(facts["shape"]), dtype=facts["dtype"], codes=f"bitsandbytes {kind}")
    coded = Coded(meta=meta, parts=parts, facts=facts | {"kind": kind})
    _judge(coded, checkpoint)
    return coded


def _facts(header: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the header says, checked key by key."""
    try:
        said = json.loads(bytes(checkpoint.read(header).flatten().tolist()))
        facts = {key: said[key] for key in TOLD} | {key: said.get(key) for key in TOLD_OF_NESTED}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _corrupt(f"{header} of {checkpoint.location} is no header of bitsandbytes") from error
    if header.partition(HEADER)[2] not in TABLES or not _sound(**facts):
        raise _corrupt(f"{header} of {checkpoint.location} says what cannot be: {facts}")
    return facts


def _sound(shape: Any, blocksize: Any, dtype: Any, nested_blocksize: Any, nested_offset: Any) -> bool:
    sizes = [*shape, blocksize] if isinstance(shape, list) and shape else [0]
    if nested_blocksize is not None:
        sizes.append(nested_blocksize)
    whole = all(type(size) is int and size > 0 for size in sizes)
    return whole and dtype in FLOATS and (nested_blocksize is None or isinstance(nested_offset, float))


def _judge(coded: Coded, checkpoint: Checkpoint) -> None:
    """Check that the tensors are there and as many as the header says."""
    metas, facts = checkpoint.metas(), coded.facts
    absent = next((name for name in coded.parts.values() if name not in metas), None)
    nested = "nested_absmax" in coded.parts
    if absent or nested != ("nested_quant_map" in coded.parts) or nested != (facts["nested_blocksize"] is not None):
        beside = absent or f"{coded.meta.name}.{NESTED[0]}"
        raise _corrupt(f"{coded.meta.name} of {checkpoint.location} is quantised, and {beside} does not fit its header")
    blocks = -(-coded.meta.numel // facts["blocksize"])
    wanted = {"codes": (coded.meta.numel + 1) // 2, "absmax": blocks * (1 if nested else 4), "quant_map": 16 * 4}
    if nested:
        wanted |= {"nested_absmax": -(-blocks // facts["nested_blocksize"]) * 4, "nested_quant_map": 256 * 4}
    for role, size in wanted.items():
        if metas[coded.parts[role]].nbytes != size:
            message = f"{coded.parts[role]} of {checkpoint.location} has {metas[coded.parts[role]].nbytes} bytes"
            raise _corrupt(f"{message}, and the header of {coded.meta.name} asks for {size}")


def _corrupt(message: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(message, hint=MIXED)


# ----------------------------------------------------------------------------------------------------- numbers


def _read(coded: Coded, checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {role: checkpoint.read(name) for role, name in coded.parts.items()}


def _bytes(codes: Tensor) -> Tensor:
    """Two codes each, flat; the file may keep them as elements of a wider dtype."""
    import torch

    return codes.contiguous().flatten().view(torch.uint8)


def _pairs(levels: Tensor) -> Tensor:
    """The two levels of each byte, (256, 2)."""
    import torch

    codes = torch.arange(256)
    return torch.stack([levels[codes >> 4], levels[codes & 15]], dim=1)


def _unpacked(packed: Tensor, first: int, last: int) -> Tensor:
    """One code an element, flat, of the elements from `first` to before `last`."""
    import torch

    found = packed[first // 2 : -(-last // 2)]
    return torch.stack([found >> 4, found & 15], dim=1).flatten()[first % 2 :][: last - first]


def _codes(packed: Tensor, rows: int, columns: int) -> Any:
    """(rows, columns), unpacked when they are asked for."""
    import torch

    def make(span: slice) -> Tensor:
        return _unpacked(packed, span.start * columns, span.stop * columns).reshape(-1, columns)

    return Lines(shape=(rows, columns), dtype=torch.uint8, make=make)


def _levels(coded: Coded, parts: Mapping[str, Tensor]) -> Tensor:
    import torch

    levels = torch.tensor(TABLES[coded.facts["kind"]], dtype=torch.float32)
    return _same(coded, parts["quant_map"], levels)


def _dynamic(coded: Coded, parts: Mapping[str, Tensor]) -> Tensor:
    """The 256 levels of absmax: 0, 1, and for each i below 7 the middles of 2^i parts of 0.1 to 1, times 10^(i - 6)."""
    import torch

    found = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32)
        middles = 10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += [*middles.tolist(), *(-middles).tolist()]
    levels, stored = torch.tensor(sorted(found), dtype=torch.float32), parts["nested_quant_map"].flatten()
    if stored[0] == -1:  # releases that quantised on a CPU wrote over the first level in doing so
        levels[0] = -1
    return _same(coded, stored, levels)


def _same(coded: Coded, stored: Tensor, levels: Tensor) -> Tensor:
    if not (stored.flatten() == levels).all():
        raise _corrupt(f"the levels beside {coded.meta.name} are not those that bitsandbytes decodes it with")
    return levels


def _scales(parts: Mapping[str, Tensor], facts: Mapping[str, Any], blocks: slice) -> Tensor:
    """One scale for each of these blocks, float32."""
    import torch

    found = parts["absmax"].flatten()[blocks]
    if "nested_absmax" not in parts:
        return found
    groups = torch.arange(blocks.start, blocks.stop) // facts["nested_blocksize"]
    scales = parts["nested_absmax"].flatten()[groups]
    return parts["nested_quant_map"].flatten()[found.long()] * scales + _offset(facts)


def _judges(coded: Coded, parts: Mapping[str, Tensor]) -> Scales:
    """What an honest scale is, nested or not."""
    from lora_check.grids import Maxima, NestedMaxima

    if "nested_absmax" not in parts:
        return Maxima(stored=parts["absmax"].flatten().double())
    return NestedMaxima(
        codes=parts["absmax"].flatten(),
        levels=_dynamic(coded, parts).double(),
        groups=parts["nested_absmax"].flatten().double(),
        mean=_offset(coded.facts),
        size=coded.facts["nested_blocksize"],
    )


def _offset(facts: Mapping[str, Any]) -> float:
    """The mean of the scales, a float32."""
    import torch

    return torch.tensor(facts["nested_offset"], dtype=torch.float32).item()


QUANTISATION = Quantisation(name="bitsandbytes-4bit", find=find, decode=decode, grid=grid)

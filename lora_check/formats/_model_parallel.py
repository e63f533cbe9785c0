"""Meta's model-parallel shards, consolidated.00.pth and so on: every matrix is cut over all of them.

    column parallel   wq wk wv w1 w3 output    (out / n, in)    joined along the rows
    row parallel      wo w2                    (out, in / n)    joined along the columns
    tok_embeddings    along the columns in Llama 1 and 2, along the rows in Llama 3
    norms, rope.freqs                          whole, and the same in every shard

Where the sizes leave a doubt about how a tensor is cut, it is refused: a guess would be an invented model.

Source: https://github.com/meta-llama/llama, llama/model.py; https://github.com/meta-llama/llama3, llama/model.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_check.assembled import Region, assembled, part
from lora_check.errors import CorruptCheckpointError, WrongInputError
from lora_check.formats import _folder
from lora_check.sources import Lines
from lora_check.types import TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

SHARD, SHARDS = re.compile(r"consolidated\.\d\d\.pth"), "consolidated.{}.pth"
PARAMS = "params.json"
ROWS, COLUMNS = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2")
EMBEDDING, HEAD, NORM = "tok_embeddings.weight", "output.weight", "norm.weight"
REPLICATED = re.compile(r"(.+\.)?(\w*norm\.weight|rope\.freqs)")
REPEATED = "a shard may be missing, or holds again what another holds"

Shape = tuple[int, ...]


class Sizes(NamedTuple):
    """What is known of the whole model; None is not known."""

    width: int
    keys: int | None
    vocabulary: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedCheckpoint:
    """Tensors cut over several files, joined when they are read, row by row or as a copy of one tensor at a time.

    _cuts   name -> the axis along which it is cut, None where every shard holds it whole
    _sound  the tensors whose shards were found to be what they should be
    """

    location: str
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    _metas: Mapping[str, TensorMeta]
    _cuts: Mapping[str, int | None]
    _shards: dict[Path, dict[str, Tensor]] = field(repr=False)
    _sound: set[str] = field(default_factory=set, repr=False)

    def metas(self) -> Mapping[str, TensorMeta]:
        """Name -> shape and dtype of the whole tensor, in the order of the first shard."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """The whole tensor.

        raises   CorruptCheckpointError: a whole tensor of which the shards differ, or a cut one of which two are equal
        """
        import torch

        pieces, cut = self._pieces(name), self._cuts[name]
        return pieces[0] if cut is None else torch.cat(pieces, cut)

    def rows(self, name: str) -> Lines | None:
        """The tensor by rows, if it is cut; errors are those of `read`."""
        pieces, cut = self._pieces(name), self._cuts[name]
        return None if cut is None else _assembled(self._metas[name].shape, pieces, cut)

    def _pieces(self, name: str) -> list[Tensor]:
        """What the shards hold of a tensor."""
        pieces = [shard[name] for shard in self._shards.values() if name in shard]
        if not pieces:
            raise _folder.absent_tensor(name, self.location, closed=name in self._metas)
        if name not in self._sound:
            _judge_pieces(name, pieces, self._cuts[name], self.location)
            self._sound.add(name)
        return pieces

    def close(self) -> None:
        """Let go of the tensors; those that were read stay valid."""
        self._shards.clear()


def siblings(path: Path) -> tuple[Path, ...]:
    """All shards of the model that a file is a shard of; a file of another name is alone.

    raises   CorruptCheckpointError: a number is left out
    """
    return _folder.counted(path.parent, SHARDS) if SHARD.fullmatch(path.name) else (path,)


def join(location: str, shards: dict[Path, dict[str, Tensor]]) -> JoinedCheckpoint:
    """The model that these shards are cut from.

    raises   CorruptCheckpointError: shards that do not fit each other or params.json
             WrongInputError: a tensor of which it cannot be known how it was cut
    """
    first, folder = next(iter(shards.values())), next(iter(shards)).parent
    pieces = {name: _meta(name, tensor) for name, tensor in first.items()}
    _judge_alike(pieces, shards)
    shapes = {name: meta.shape for name, meta in pieces.items()}
    sizes = _sizes(folder, shapes, len(shards))
    cuts = {name: _cut(name, shape, sizes, len(shards), folder) for name, shape in shapes.items()}
    metas = {name: _whole(meta, cuts[name], len(shards)) for name, meta in pieces.items()}
    _judge_sizes(metas, sizes, folder)
    return JoinedCheckpoint(
        location=location,
        files=tuple(shards),
        config=_folder.read_config(folder),
        _metas=MappingProxyType(metas),
        _cuts=cuts,
        _shards=shards,
    )


def _assembled(shape: Shape, pieces: Sequence[Tensor], cut: int) -> Lines:
    """The pieces below one another, or side by side."""
    size, turned = pieces[0].shape[cut], bool(cut)
    parts = [
        part(Region(rows=(size * place, size * (place + 1)), transposed=turned), shape, Region(transposed=turned), one)
        for place, one in enumerate(pieces)
    ]
    return assembled(shape, pieces[0].dtype, [one for one in parts if one])


def _judge_pieces(name: str, pieces: Sequence[Tensor], cut: int | None, location: str) -> None:
    same = [_equal(pieces[0], piece) for piece in pieces[1:]]
    if cut is None and not all(same):
        message = f"tensor {name!r} of {location} should be the same in all shards, and is not"
        raise CorruptCheckpointError(message, hint=_folder.MIXED)
    if cut is not None and any(same):
        message = f"tensor {name!r} of {location} should be cut, and two shards hold the same piece of it"
        raise CorruptCheckpointError(message, hint=_folder.MIXED)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two pieces hold the same bytes."""
    import torch

    return torch.equal(*(piece.contiguous().view(torch.uint8) for piece in (one, other)))


def _meta(name: str, tensor: Tensor) -> TensorMeta:
    return TensorMeta(name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def _whole(piece: TensorMeta, cut: int | None, count: int) -> TensorMeta:
    shape = tuple(size * count if axis == cut else size for axis, size in enumerate(piece.shape))
    return TensorMeta(name=piece.name, shape=shape, dtype=piece.dtype)


# ------------------------------------------------------------------------------------------------------- the cut


def _sizes(folder: Path, shapes: Mapping[str, Shape], count: int) -> Sizes:
    """The width, the rows of wk and wv, and the vocabulary, as params.json or whole tensors tell them."""
    params = _folder.read_object(folder / PARAMS) if (folder / PARAMS).is_file() else {}
    norm, head = shapes.get(NORM, ()), shapes.get(HEAD, ())
    width = _positive(params.get("dim")) or (norm[0] if len(norm) == 1 else None)
    if width is None:
        raise _unknown(f"how the tensors of {folder} are cut cannot be known: nothing there tells the width")
    heads = _positive(params.get("n_heads"))
    groups = _positive(params.get("n_kv_heads")) or heads
    vocabulary = _positive(params.get("vocab_size")) or (head[0] * count if len(head) == 2 else None)
    return Sizes(width, width // heads * groups if heads and groups else None, vocabulary)


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _cut(name: str, shape: Shape, sizes: Sizes, count: int, folder: Path) -> int | None:
    """Along which axis a tensor is cut."""
    if name == EMBEDDING and len(shape) == 2:
        return _cut_of_embedding(shape, sizes, count, folder)
    if REPLICATED.fullmatch(name) and len(shape) == 1:
        return None
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if name.endswith(".weight") and len(shape) == 2 and module in ROWS + COLUMNS:
        return 0 if module in ROWS else 1
    raise _unknown(f"how tensor {name!r} of {folder} is cut over {count} shards is not known here")


def _cut_of_embedding(shape: Shape, sizes: Sizes, count: int, folder: Path) -> int | None:
    rows, columns = shape
    if sizes.width == columns * count:
        return 1
    if sizes.width == columns and sizes.vocabulary == rows * count:
        return 0
    if sizes.width == columns and sizes.vocabulary == rows:
        return None
    told = f"the width is {sizes.width}, the vocabulary {sizes.vocabulary or 'not told'}"
    raise _unknown(f"how tensor {EMBEDDING!r} of {folder} is cut cannot be known: a shard holds {shape}, {told}")


def _unknown(message: str) -> WrongInputError:
    hint = f"put the {PARAMS} of the model beside its shards, or give the model in one piece"
    return WrongInputError(message, hint=hint)


# ------------------------------------------------------------------------------------------------------- judging


def _judge_alike(pieces: Mapping[str, TensorMeta], shards: Mapping[Path, Mapping[str, Tensor]]) -> None:
    """Check that every shard holds a piece of every tensor, all of one shape and dtype."""
    first = next(iter(shards))
    for path, tensors in shards.items():
        for name in pieces.keys() ^ tensors.keys():
            message = f"tensor {name!r} lies in only one of {first} and {path.name}"
            raise CorruptCheckpointError(message, hint=_folder.MIXED)
        for name, tensor in tensors.items():
            if _meta(name, tensor) != pieces[name] or str(tensor.layout) != "torch.strided":
                message = f"tensor {name!r} of {path} is not of the shape and dtype of the other shards' pieces"
                raise CorruptCheckpointError(message, hint=_folder.MIXED)


def _judge_sizes(metas: Mapping[str, TensorMeta], sizes: Sizes, folder: Path) -> None:
    """Check that the joined shapes are those of one model."""
    width, keys, vocabulary = sizes
    square, into, back = (width, width), (None, width), (width, None)
    head, key = (vocabulary, width), (keys, width)
    wanted = {"wq": square, "wo": square, "wk": key, "wv": key, "w1": into, "w3": into, "w2": back, "output": head}
    for name, meta in metas.items():
        shape = wanted.get(name.removesuffix(".weight").rsplit(".", 1)[-1])
        if shape and any(size not in (None, seen) for size, seen in zip(shape, meta.shape, strict=True)):
            told = " x ".join(str(size or "any") for size in shape)
            message = f"tensor {name!r} of {folder} is joined to {meta.shape}, but it should be {told}"
            raise CorruptCheckpointError(message, hint=REPEATED)

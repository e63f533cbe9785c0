"""Files and memory: which part of which tensor of a file is which part of which parameter of the loaded model.

Layouts give the links; here they are turned round: a base file is seen under the names of the merged one, and a
parameter that an adapter names is found in the files that hold its parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_check import registry
from lora_check.assembled import Region, assembled, part
from lora_check.sources import Lines, offered, source_of
from lora_check.types import Checkpoint, Link, RowSource, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

Metas = Mapping[str, TensorMeta]


def lookup(name: str, names: Metas, config: Mapping[str, Any]) -> str | None:
    """The name under which a tensor lies: its own, or the one that the first layout that knows it gives."""
    if name in names:
        return name
    for layout in registry.load("layouts").values():
        if layout.resolve and (found := layout.resolve(name, names, config)):
            return str(found)
    return None


def links_of(metas: Metas, config: Mapping[str, Any]) -> tuple[Link, ...]:
    """All that the layouts know of this file's names."""
    layouts = [layout for layout in registry.load("layouts").values() if layout.links]
    return tuple(dict.fromkeys(link for layout in layouts for link in layout.links(metas, config)))


def by_memory(metas: Metas, config: Mapping[str, Any]) -> dict[str, list[Link]]:
    """Parameter of the loaded model -> the links to the tensors of the file that hold it."""
    found: dict[str, list[Link]] = {}
    for link in links_of(metas, config):
        found.setdefault(link.memory, []).append(link)
    return found


def loaded_as(name: str, config: Mapping[str, Any]) -> str:
    """The name that a tensor of that name is loaded under, as the first layout that knows says; else its own."""
    layouts = [layout for layout in registry.load("layouts").values() if layout.memory]
    return next((found for layout in layouts if (found := layout.memory(name, config))), name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A region of a source tensor, and the region of a new tensor where it goes."""

    source: str
    taken: Region
    placed: Region


class Realigned:
    """A checkpoint seen under other names: some tensors are put together from its own, the others are as they were."""

    def __init__(self, inner: Checkpoint, pieces: Mapping[str, Sequence[Piece]], metas: Metas) -> None:
        self.inner, self.pieces, self._metas = inner, pieces, metas

    @property
    def location(self) -> str:
        return self.inner.location

    @property
    def config(self) -> Mapping[str, Any]:
        return self.inner.config

    @property
    def files(self) -> tuple[Any, ...]:
        """The files of the checkpoint itself, if it has any."""
        return tuple(getattr(self.inner, "files", ()))

    def metas(self) -> Metas:
        """Own names that are still there, and the new ones."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """The tensor; a new one that is a view of one of its own is not copied."""
        if name not in self.pieces:
            return self.inner.read(name)
        meta, pieces = self._metas[name], self.pieces[name]
        first = self.inner.read(pieces[0].source)
        view = self._view(name, first)
        if view is not None:
            return view
        whole = first.new_empty(meta.shape)
        for piece in pieces:
            piece.placed.of(whole).copy_(piece.taken.of(self.inner.read(piece.source)))
        return whole

    def rows(self, name: str) -> RowSource | None:
        """The tensor by rows; None where `read` gives a view, or where what has to be decoded is turned over."""
        if name not in self.pieces:
            return offered(self.inner, name)
        meta, pieces = self._metas[name], self.pieces[name]
        sources = {piece.source: source_of(self.inner, piece.source) for piece in pieces}
        view = self._view(name, sources[pieces[0].source])
        if view is not None and (view.ndim < 3 or view.is_contiguous()):
            return None
        parts = [part(one.placed, meta.shape, one.taken, sources[one.source]) for one in pieces]
        known = [one for one in parts if one is not None]
        return assembled(meta.shape, sources[pieces[0].source].dtype, known) if len(known) == len(parts) else None

    def _view(self, name: str, source: Any) -> Tensor | None:
        """A tensor that lies in one of its own as it is."""
        pieces = self.pieces[name]
        if len(pieces) > 1 or pieces[0].placed.transposed or isinstance(source, Lines):
            return None
        view = pieces[0].taken.of(source)
        return view if tuple(view.shape) == self._metas[name].shape else None

    def close(self) -> None:
        """Close the checkpoint itself."""
        self.inner.close()


def realigned(base: Checkpoint, merged: Checkpoint) -> Checkpoint:
    """BASE under the names of MERGED, where one of them fuses, splits or stacks what the other does not.

    Headers only. Names that both have, or that no layout links, stay as they are.
    """
    ours, theirs, config = base.metas(), merged.metas(), merged.config or base.config
    new = [name for name in theirs if lookup(name, ours, base.config) is None]
    if not new or all(lookup(name, theirs, config) for name in ours):
        return base
    sources = by_memory(ours, base.config)
    wanted = links_of(theirs, config)
    pieces = {name: made for name in new if (made := _pieces(name, wanted, sources, ours, theirs))}
    return _under_new_names(base, pieces, theirs) if pieces else base


def _pieces(
    name: str, wanted: Sequence[Link], sources: Mapping[str, Sequence[Link]], ours: Metas, theirs: Metas
) -> tuple[Piece, ...]:
    """What `name` is put together from; nothing, unless the pieces cover it exactly once."""
    named = [link for link in wanted if link.file == name] or [Link(file=name, memory=name)]
    pieces = tuple(piece for link in named for other in sources.get(link.memory, ()) for piece in _meet(link, other))
    covered = sum(_size(piece, ours[piece.source].shape) for piece in pieces)
    return pieces if covered == theirs[name].numel else ()


def _meet(wanted: Link, held: Link) -> Iterator[Piece]:
    """The common part of two links to one parameter."""
    if wanted.expert is not None and held.expert is not None and wanted.expert != held.expert:
        return
    low = max((one.rows[0] for one in (wanted, held) if one.rows), default=0)
    high = min((one.rows[1] for one in (wanted, held) if one.rows), default=None)
    if high is not None and high <= low:
        return
    yield Piece(
        source=held.file,
        taken=_region(held, low, high, wanted.expert if held.expert is None else None),
        placed=_region(wanted, low, high, held.expert if wanted.expert is None else None),
    )


def _region(link: Link, low: int, high: int | None, expert: int | None) -> Region:
    """Rows low to high of the parameter, as rows of the file's tensor."""
    if high is None:
        return Region(expert=expert, rows=link.file_rows, transposed=link.transposed)
    shift = (link.file_rows[0] if link.file_rows else 0) - (link.rows[0] if link.rows else 0)
    return Region(expert=expert, rows=(low + shift, high + shift), transposed=link.transposed)


def _size(piece: Piece, shape: tuple[int, ...]) -> int:
    if piece.taken.expert is not None:
        shape = shape[1:]
    if piece.taken.rows is None:
        return math.prod(shape)
    turned = (*shape[:-2], *shape[:-3:-1]) if piece.taken.transposed else shape
    axis = max(0, len(turned) - 2)
    return math.prod(turned) // turned[axis] * (piece.taken.rows[1] - piece.taken.rows[0])


def _under_new_names(base: Checkpoint, pieces: Mapping[str, Sequence[Piece]], theirs: Metas) -> Realigned:
    ours = base.metas()
    used: dict[str, int] = {}
    for made in pieces.values():
        for piece in made:
            used[piece.source] = used.get(piece.source, 0) + _size(piece, ours[piece.source].shape)
    kept = {name: meta for name, meta in ours.items() if used.get(name, -1) != meta.numel}
    new = {
        name: TensorMeta(name=name, shape=theirs[name].shape, dtype=ours[made[0].source].dtype)
        for name, made in pieces.items()
    }
    return Realigned(base, pieces, kept | new)

"""Checkpoints whose quantised tensors are seen as the numbers that they stand for.

The schemes in quantisations/ find what lies in codes; here such a tensor takes its place among the others, under its
own name, with the dtype and the shape of its numbers, and what belongs to it is no tensor any more. It is decoded when
it is read, and no sooner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_check import registry
from lora_check.errors import CorruptCheckpointError, InputError, UnknownFormatError
from lora_check.layouts.gguf_names import from_gguf_rows, permuted
from lora_check.links import Realigned
from lora_check.sources import Lines, offered
from lora_check.types import FLOATS, Checkpoint, Coded, Grid, Quantisation, RowSource, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

UNROUNDED = "and how a merge is rounded to it is not modelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor in codes, the scheme it is kept in, and the file that it lies in."""

    scheme: Quantisation
    coded: Coded
    file: Checkpoint

    @property
    def grid_is_known(self) -> bool:
        """Whether it is known how a merge is rounded to these codes."""
        return self.scheme.grid is not None and not self.coded.meta.sealed

    @property
    def codes(self) -> str:
        """The tensor of the codes themselves."""
        return next(iter(self.coded.parts.values()))

    def parts(self) -> dict[str, Tensor]:
        """Role -> tensor as stored."""
        return {role: self.file.read(name) for role, name in self.coded.parts.items()}

    def decode(self) -> Tensor:
        """The numbers, rows in the order of transformers; errors are those of `rows`."""
        return self.rows()[:]

    def rows(self) -> Lines:
        """The numbers, made when they are asked for.

        raises   UnknownFormatError: it is sealed, or a library cannot decode it
                 CorruptCheckpointError: its heads do not divide its rows
        """
        meta = self.coded.meta
        if meta.sealed or self.scheme.decode is None:
            message = f"{meta.name} of {self.file.location} is stored as {meta.stored_as}, {meta.sealed}"
            raise UnknownFormatError(message, hint="decode the model with the library that made it")
        with _in_role(self.file):
            found = self.scheme.decode(self.coded, self.file)
            heads = permuted(meta.name, self.file.config)
            lines = _in_order(found, heads, meta.name) if heads else found
        assert isinstance(lines, Lines), self.scheme.name
        return replace(lines, make=partial(self._make, lines.make))

    def _make(self, make: Callable[[slice], Tensor], lines: slice) -> Tensor:
        with _in_role(self.file):
            return make(lines)


def _in_order(found: RowSource, heads: int, name: str) -> Lines:
    """Rows of a GGUF file in the order of transformers, head by head."""
    size = found.shape[0] // heads
    if size * heads != found.shape[0] or size % 2:
        message = f"the {found.shape[0]} rows of {name} are not {heads} heads of an even size"
        raise CorruptCheckpointError(message, hint="convert the model again")

    def make(lines: slice) -> Tensor:
        rows: Tensor = from_gguf_rows(found[lines], (lines.stop - lines.start) // size)
        return rows.reshape(len(rows), -1)

    return Lines(shape=found.shape, dtype=found.dtype, make=make, unit=size)


class Decoded:
    """A checkpoint of which some tensors are decoded when they are read, and those that belong to them are hidden."""

    def __init__(self, inner: Checkpoint, stored: Mapping[str, Stored], metas: Mapping[str, TensorMeta]) -> None:
        self.inner, self.stored, self._metas = inner, stored, metas

    @property
    def location(self) -> str:
        return self.inner.location

    @property
    def config(self) -> Mapping[str, Any]:
        return self.inner.config

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the checkpoint itself, if it has any."""
        return tuple(getattr(self.inner, "files", ()))

    @property
    def metadata(self) -> Mapping[str, str]:
        """The text that the files carry beside their tensors."""
        found: Mapping[str, str] = getattr(self.inner, "metadata", {})
        return found

    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor as numbers, in file order."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """The tensor as numbers."""
        return self.stored[name].decode() if name in self.stored else self.inner.read(name)

    def rows(self, name: str) -> RowSource | None:
        """The tensor by rows, if it lies in codes or the checkpoint reads it so."""
        return self.stored[name].rows() if name in self.stored else offered(self.inner, name)

    def close(self) -> None:
        """Close the checkpoint itself."""
        self.inner.close()


def decoded(base: Checkpoint, merged: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """BASE and MERGED, their quantised tensors as numbers; a checkpoint without any stays what it is.

    Headers only, but for those headers that a scheme keeps in a tensor.
    """
    ours, theirs = _find(base), _find(merged)
    lost = {rider for name, one in ours.items() if name not in theirs for rider in one.coded.riders}
    lost -= merged.metas().keys()
    return _seen(base, ours, merged, lost), _seen(merged, theirs, base, set(), merges=True)


def stored_as(checkpoint: Checkpoint, name: str) -> Stored | None:
    """How a tensor lies in its file, if it lies there in codes, and alone."""
    while isinstance(checkpoint, Realigned):
        if name in checkpoint.pieces:
            return None
        checkpoint = checkpoint.inner
    return checkpoint.stored.get(name) if isinstance(checkpoint, Decoded) else None


def grid_of(stored: Stored, base: Stored | None = None) -> Grid:
    """What an honest quantiser can have turned into these codes, given those of the base."""
    assert stored.scheme.grid is not None, stored.scheme.name
    alike = base if base and base.scheme is stored.scheme and not base.coded.meta.sealed else None
    with _in_role(stored.file):
        return stored.scheme.grid(stored.coded, stored.file, (alike.coded, alike.file) if alike else None)


def _find(checkpoint: Checkpoint) -> dict[str, Stored]:
    """What lies in codes, by the name of its numbers; no tensor of the file belongs to two of them.

    Where the file has the numbers too, these are what a loader takes, and the codes are tensors like any other.
    """
    if all(meta.dtype in FLOATS for meta in checkpoint.metas().values()):
        return {}
    found: dict[str, Stored] = {}
    taken: set[str] = set()
    for scheme in registry.load("quantisations").values():
        with _in_role(checkpoint):
            every = scheme.find(checkpoint)
        for coded in every:
            apart = coded.meta.name in checkpoint.metas() and coded.meta.name not in coded.parts.values()
            if taken.isdisjoint(coded.parts.values()) and coded.meta.name not in found and not apart:
                found[coded.meta.name] = Stored(scheme=scheme, coded=coded, file=checkpoint)
                taken.update(coded.parts.values())
    return found


@contextmanager
def _in_role(checkpoint: Checkpoint) -> Iterator[None]:
    """Let an error say whether it is BASE or MERGED that was being read."""
    try:
        yield
    except InputError as error:
        role = getattr(checkpoint, "role", "")
        if not role or error.message.startswith(f"{role}: "):
            raise
        raise type(error)(f"{role}: {error.message}", hint=error.hint) from error


def _seen(
    checkpoint: Checkpoint, stored: Mapping[str, Stored], other: Checkpoint, lost: set[str], *, merges: bool = False
) -> Checkpoint:
    """The checkpoint with these tensors decoded.

    lost     what a merged model without codes has no place for
    merges   the codes are what a merge was rounded to
    """
    if not stored:
        return checkpoint
    metas, others = checkpoint.metas(), other.metas()
    codes = {one.codes: _meta(one, metas, others, merges=merges) for one in stored.values()}
    hidden = lost | {part for one in stored.values() for part in one.coded.parts.values()}
    seen = [codes.get(name, meta) for name, meta in metas.items() if name in codes or name not in hidden]
    return Decoded(checkpoint, stored, {meta.name: meta for meta in seen})


def _meta(
    one: Stored, metas: Mapping[str, TensorMeta], others: Mapping[str, TensorMeta], *, merges: bool
) -> TensorMeta:
    """What plan sees of it: numbers, or where a merge cannot be rounded to it, a dtype that nothing is modelled for."""
    meta, parts = one.coded.meta, one.coded.parts
    like = others.get(meta.name, metas[one.codes])
    meta = replace(
        meta,
        shape=meta.shape or like.shape,
        packed=meta.packed if meta.packed is not None else sum(metas[part].nbytes for part in parts.values()),
    )
    if merges and not one.grid_is_known and meta.codes and meta.dtype in FLOATS:
        return replace(meta, dtype=meta.codes, sealed=meta.sealed or UNROUNDED)
    return meta

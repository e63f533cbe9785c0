"""The line of a merge: open, plan, lay out, write. Where `check` compares with a saved file, this makes one.

Headers first: whatever cannot be recomputed, does not fit on the disk or lies in the way is told before a byte is
written. Then shard by shard, tile by tile, into a hidden folder that gets its name when all of it is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_check.errors import UnknownFormatError, UsageError, WrongInputError
from lora_check.inputs import Opened, opened_inputs
from lora_check.locations import open_checkpoint
from lora_check.means import Progress, cores
from lora_check.quantised import decoded
from lora_check.types import FLOATS, Adapter, Checkpoint
from lora_check.versions import versions
from lora_check.writing import companions, workplace
from lora_check.writing.proposal import Proposal, Sketch, proposed

if TYPE_CHECKING:
    from lora_check.writing.tensors import Piece, Writer


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What a merge wrote.

    files    names in `location`: shards, index, configuration, tokenizer
    bytes    of the shards          tensors   in them          targets   of those, how many an adapter changed
    written  bytes that this run wrote of them
    kept     shards that an earlier run with these inputs had finished
    warnings what a report would warn of, whatever was written
    """

    location: str
    files: tuple[str, ...]
    bytes: int
    written: int
    tensors: int
    targets: int
    arithmetic: str
    kept: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


def merge(
    base: Any,
    adapters: Any,
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    combination: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    arithmetic: str = "fp32-add",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Write what `check` expects of BASE and ADAPTER(S), shard by shard, in BASE's own layout and dtypes.

    base, adapters, weights, combination   as in `check`
    out              a folder that is not there yet
    dtype            of every floating tensor, as if BASE had been loaded in it; it decodes a quantised BASE
    max_shard_size   bytes, or text such as "5GB": shards named as transformers does, in place of BASE's files
    arithmetic       the order of operations, by its name in `rounding`
    raises           LoraCheckError: an input that cannot be read or merged, or a place that cannot be written
    """
    from lora_check.work import Job, one_thread
    from lora_check.writing.tensors import Writer
    from lora_check.writing.tensors import arithmetic as named

    began, how = time.monotonic(), named(arithmetic)
    if jobs is not None and jobs < 1:
        raise UsageError(f"{jobs} jobs cannot do anything", hint="give one or more, or leave it out")
    place = workplace.destination(out)
    with opened(base, adapters, weights, combination) as sources, one_thread():
        proposal = proposed(sources, dtype, max_shard_size, str(place))
        writer = Writer(job=Job(sources.base, sources.adapters, proposal.sketch, proposal.plan, {}), how=how)
        key = _fingerprint(sources, proposal, arithmetic, weights, combination)
        with workplace.workplace(place, key) as room, _told(place):
            kept, files = _write(room, proposal, sources, writer, jobs or cores(), progress)
            room.publish()
    return Merged(
        location=str(place),
        files=files,
        bytes=proposal.layout.size,
        written=sum(shard.size for shard in proposal.layout.shards if shard.name not in kept),
        tensors=len(proposal.plan.pairings),
        targets=sum(one.kind != "bystander" for one in proposal.plan.pairings),
        arithmetic=arithmetic,
        kept=kept,
        warnings=proposal.warnings,
        seconds=time.monotonic() - began,
    )


# ------------------------------------------------------------------------------ open


@contextmanager
def opened(
    base: Any, adapters: Any, weights: Sequence[float] | None = None, combination: str | None = None
) -> Iterator[Opened]:
    """Base and adapters, headers read; what is to be merged from them is known by its names alone."""
    beside = companions.BESIDE
    with closing(open_checkpoint(base, role="base", beside=beside)) as found:
        _refuse_gguf(found)
        seen, _ = decoded(found, Sketch(config={}, tensors={}))
        outline = Sketch(config={}, tensors={one.name: one for one in seen.metas().values() if one.dtype in FLOATS})
        if not outline.tensors:
            hint = "give the model to be merged"
            raise WrongInputError(f"base: {found.location} holds no floating numbers", hint=hint)
        names = {name: outline.read(name) for name in outline.tensors}
        with opened_inputs(base, adapters, names, weights, combination, base_file=found, beside=beside) as sources:
            yield sources


def _refuse_gguf(base: Checkpoint) -> None:
    if base.config.get("gguf"):
        raise UnknownFormatError(
            f"base: {base.location} is a GGUF file, and merging writes safetensors under other names",
            hint="give the checkpoint that it was converted from",
        )


def _fingerprint(
    sources: Opened, proposal: Proposal, arithmetic: str, weights: Sequence[float] | None, combination: str | None
) -> str:
    """Of all that decides a byte of the shards; inputs in memory are never the same again."""
    inputs = []
    for one in (sources.base, *(member.checkpoint for adapter in sources.adapters for member in _members(adapter))):
        files: Sequence[Path] = getattr(one, "files", ())
        found = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        inputs.append(found or uuid.uuid4().hex)
    raw = [dict(member.config.raw) for adapter in sources.adapters for member in _members(adapter)]
    heads = [(shard.name, hashlib.sha256(shard.head).hexdigest()) for shard in proposal.layout.shards]
    told = [versions(), inputs, raw, dict(sources.base.config), heads, arithmetic, weights, combination]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _members(adapter: Adapter) -> Sequence[Adapter]:
    return adapter.members or (adapter,)


# ------------------------------------------------------------------------------ write


def _write(
    room: workplace.Workplace,
    proposal: Proposal,
    sources: Opened,
    writer: Writer,
    jobs: int,
    progress: Progress | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Shards, then what lies beside them; the shards that were there already, and the names of all files."""
    shards = proposal.layout.shards
    kept = [shard for shard in shards if room.has(shard.name, shard.size)]
    missing = [shard for shard in shards if shard not in kept]
    workplace.demand_space(room.out, sum(shard.size for shard in missing))
    pairings = {one.merged.name: one for one in proposal.plan.pairings}
    total = sum(shard.data for shard in missing)
    with progress(total) if progress else nullcontext(_silent) as done:
        for shard in missing:
            with room.file(shard.name, shard.size) as descriptor:
                workplace.write_all(descriptor, shard.head, 0)
                _fill(writer.pieces(shard, pairings), writer, jobs, descriptor, done)
            room.keep(shard.name, shard.size)
    beside = _write_beside(room, proposal, sources)
    return tuple(one.name for one in kept), (*(shard.name for shard in shards), *beside)


def _fill(pieces: Iterable[Piece], writer: Writer, jobs: int, descriptor: int, done: Callable[[int], None]) -> None:
    """Every piece of a shard, on `jobs` threads; when one fails, the others leave after their tile."""
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            running = [pool.submit(writer.write, piece, descriptor, done) for piece in pieces]
            for one in running:
                one.result()
        except BaseException:
            writer.stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _write_beside(room: workplace.Workplace, proposal: Proposal, sources: Opened) -> tuple[str, ...]:
    """Index, configuration, tokenizer and the rest."""
    layout, folder = proposal.layout, companions.folder_of(sources.base)
    texts: dict[str, bytes] = {}
    if layout.index:
        texts[layout.index] = (json.dumps(layout.map, indent=2, ensure_ascii=False) + "\n").encode()
    config = companions.config_bytes(folder, sources.base.config, proposal.sketch.config)
    if config is not None:
        texts[companions.CONFIG] = config
    for name, data in texts.items():
        room.write(name, data)
    given = [companions.folder_of(one.checkpoint) for adapter in sources.adapters for one in _members(adapter)]
    adapters = [one for one in given if one is not None]
    files = companions.companions(folder, adapters, proposal.changes)
    for name, path in files.items():
        room.write(name, path.read_bytes())
    return (*texts, *files)


@contextmanager
def _told(place: Path) -> Iterator[None]:
    """What the system says when it cannot read or write any more, as a sentence."""
    try:
        yield
    except OSError as error:
        reason, kept = (error.strerror or str(error)).lower(), "shards that are finished are kept for the next run"
        raise UsageError(f"OUT {place} could not be written: {reason}", hint=kept) from error


def _silent(_: int) -> None:
    """No one watches."""

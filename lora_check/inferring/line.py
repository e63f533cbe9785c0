"""The line of `infer`: open, pair, look at each matrix; what all of them say together is for `words`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from lora_check.errors import UsageError, WrongInputError
from lora_check.inferring.deltas import Delta, Factors, grain, is_copy
from lora_check.inferring.judging import judge
from lora_check.inferring.outcome import Change, Inference, Kind
from lora_check.inferring.pairs import Pair, paired
from lora_check.links import realigned
from lora_check.locations import open_checkpoint
from lora_check.means import Progress, cores
from lora_check.quantised import decoded
from lora_check.reading.stamps import refuse_changed, stamps
from lora_check.sources import matrix
from lora_check.types import Checkpoint
from lora_check.work import one_thread


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """One matrix as it was seen: what it is, and of a change of low rank, the numbers behind it."""

    change: Change
    delta: Delta | None = None
    factors: Factors | None = None


@contextmanager
def opened(base: Any, merged: Any) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Both, headers read, BASE under the names of MERGED where one of them fuses or stacks what the other does not."""
    with (
        closing(open_checkpoint(base, role="base")) as first,
        closing(open_checkpoint(merged, role="merged")) as second,
    ):
        files = stamps(first, second)
        ours, theirs = decoded(first, second)
        yield realigned(ours, theirs), theirs
        refuse_changed(files)


def infer(base: Any, merged: Any, *, jobs: int | None = None, progress: Progress | None = None) -> Inference:
    """What kind of change MERGED is of BASE: which modules, of what rank, from the numbers of both alone.

    base, merged   a location, a state dict or an nn.Module
    raises         LoraCheckError: an input that cannot be read, or two models that have no tensor in common
    """
    began = time.monotonic()
    with opened(base, merged) as (ours, theirs), one_thread():
        sights = seen(ours, theirs, lambda one: one.change, jobs=jobs, progress=progress)
        return inference(ours, theirs, sights, began)


def inference(base: Checkpoint, merged: Checkpoint, changes: Sequence[Change], began: float) -> Inference:
    """All of it together."""
    found = paired(base, merged)
    return Inference(
        changes=tuple(changes),
        missing=found.missing,
        extra=found.extra,
        base=_described(base),
        merged=_described(merged),
        seconds=time.monotonic() - began,
    )


def seen(
    base: Checkpoint,
    merged: Checkpoint,
    keep: Callable[[Sight], Any],
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> list[Any]:
    """What is to be kept of each matrix of MERGED, in the order of the file."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"{jobs} jobs cannot do anything", hint="give one or more, or leave it out")
    pairs = paired(base, merged).pairs
    if not pairs:
        raise WrongInputError(
            f"no tensor of MERGED {merged.location} has a name of BASE {base.location}",
            hint="give two checkpoints of one architecture",
        )
    with (
        progress(sum(one.bytes for one in pairs), "looking") if progress else nullcontext(_silent) as done,
        ThreadPoolExecutor(max_workers=jobs or cores()) as pool,
    ):
        try:
            found = []
            for pair, kept in zip(pairs, pool.map(lambda one: _kept(base, merged, one, keep), pairs), strict=True):
                found += kept
                done(pair.bytes)
            return found
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _kept(base: Checkpoint, merged: Checkpoint, pair: Pair, keep: Callable[[Sight], Any]) -> list[Any]:
    return [keep(sight) for sight in look_at(base, merged, pair)]


def look_at(base: Checkpoint, merged: Checkpoint, pair: Pair) -> Iterator[Sight]:
    """Each matrix of a tensor, and the rows that only MERGED has."""
    sources = matrix(merged, pair.merged.name, pair.stacked), matrix(base, pair.base.name, pair.stacked)
    if pair.refused:
        yield Sight(change=_refused(pair, *sources))
        return
    for tensor, first in pair.places:
        yield _look(pair, tensor, first, *sources)
    if pair.shape[0] != pair.rows:
        yield Sight(change=pair.change(f"{pair.merged.name}", Kind.NEW, rows=pair.shape[0] - pair.rows))


def _refused(pair: Pair, merged: Any, base: Any) -> Change:
    """A tensor whose numbers say nothing: a copy all the same, if it is one."""
    delta = Delta(merged=merged, base=base, shape=pair.shape, formats=("", ""))
    same = pair.merged.shape == pair.base.shape and pair.merged.dtype == pair.base.dtype and not pair.merged.sealed
    if same and not pair.base.sealed and is_copy(delta):
        return pair.change(pair.merged.name)
    return pair.change(pair.merged.name, Kind.UNCLEAR, because=pair.refused)


def _look(pair: Pair, tensor: str, first: int, merged: Any, base: Any) -> Sight:
    """One matrix."""
    shape = pair.rows, pair.shape[1]
    dtypes = pair.merged.dtype, pair.base.dtype
    delta = Delta(merged=merged, base=base, shape=shape, first=first, formats=dtypes)
    if not pair.merged.numel or is_copy(delta):
        return Sight(change=pair.change(tensor))
    grains = tuple(grain(rows, dtype, _there(delta)) for rows, dtype in zip((merged, base), dtypes, strict=True))
    delta = Delta(merged=merged, base=base, shape=shape, first=first, formats=(grains[0], grains[1]))
    if pair.is_vector:
        return Sight(change=pair.change(tensor, Kind.VECTOR, changed=_differing(delta)))
    change, factors = judge(delta, pair.change(tensor))
    return Sight(change=change, delta=delta, factors=factors)


def _there(delta: Delta) -> Iterator[slice]:
    for rows in delta.spans():
        yield slice(delta.first + rows.start, delta.first + rows.stop)


def _differing(delta: Delta) -> int:
    return sum(int(delta.tile(rows).count_nonzero()) for rows in delta.spans())


def _described(checkpoint: Checkpoint) -> Mapping[str, Any]:
    metas = checkpoint.metas().values()
    return {
        "location": checkpoint.location,
        "tensors": len(metas),
        "bytes": sum(meta.nbytes for meta in metas),
        "dtypes": sorted({meta.stored_as for meta in metas}),
    }


def _silent(_: int) -> None:
    """No one watches."""

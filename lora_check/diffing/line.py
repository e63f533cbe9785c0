"""Open A and B, pair their tensors, compare each pair, judge what was expected. Readable aloud."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_check import registry
from lora_check.diffing.expectations import answers
from lora_check.diffing.measure import compare
from lora_check.diffing.nouns import STATUSES, Conversion, Difference, Entry, Shown, Sizes
from lora_check.diffing.pairs import Pair, Pairs, make_pairs, unwrapped
from lora_check.diffing.values import TENSORS, Asked, chosen, parse, show
from lora_check.errors import InputError, UsageError, WrongInputError
from lora_check.items import item, sizes_of
from lora_check.links import realigned
from lora_check.locations import Located, Role, open_checkpoint
from lora_check.means import Progress, cores
from lora_check.quantised import decoded, stored_as
from lora_check.reading.meter import metered
from lora_check.reading.plain import How, is_plain, reading
from lora_check.reading.stamps import refuse_changed, stamps
from lora_check.reading.throughput import Throughput
from lora_check.same import same_bits
from lora_check.sources import matrix
from lora_check.types import Checkpoint
from lora_check.versions import versions
from lora_check.work import one_thread

if TYPE_CHECKING:
    from torch import Tensor

ROLES: dict[str, Role] = {"A": "base", "B": "merged"}
"""What the two are opened as; an adapter is opened as one."""

SMALL = 1 << 24
"""Bytes of both that a tensor has on average where several threads are worth having: below, they only take turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What is wanted to know.

    show                 NAME or NAME[INDEX], of which values are shown
    changed, unchanged   glob patterns of what is expected to be so
    include, exclude     glob patterns of what is looked at
    every                show all tensors that a pattern means
    """

    show: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    every: bool = False


def diff(
    a: Any,
    b: Any,
    asking: Asking | None = None,
    *,
    jobs: int | None = None,
    read: How = "auto",
    progress: Progress | None = None,
) -> Difference:
    """Compare every tensor of two checkpoints, whatever made them.

    a, b     a location, a state dict or an nn.Module
    raises   LoraCheckError: an input that cannot be read, or a question that cannot be asked
    """
    asking, began = asking or Asking(), time.monotonic()
    if not all((*asking.changed, *asking.unchanged)):
        raise UsageError("what is expected of '' is expected of nothing", hint="give a name or a glob")
    if jobs is not None and jobs < 1:
        raise UsageError(f"{jobs} jobs cannot do anything", hint="give one or more, or leave it out")
    shows = [parse(one) for one in asking.show]
    with reading(read), ExitStack() as stack:
        files = [stack.enter_context(closing(_opened(one, name))) for one, name in ((a, "A"), (b, "B"))]
        with _named():
            crew = _crew(files[0], files[1], asking, jobs, progress)
            for one in shows:
                chosen(one, [*(pair.entry for pair in crew.pairs.pairs), *crew.pairs.rest])
            before = stamps(*files)
            entries, throughput = crew.compared()
            shown, more = _shown(shows, entries, crew, asking)
            refuse_changed(before)
        return Difference(
            a=_described(files[0], crew.a),
            b=_described(files[1], crew.b) | _same_files(files[0], files[1]),
            tool=versions(),
            entries=entries,
            answers=answers(entries, asking.changed, asking.unchanged),
            shown=shown,
            more=more,
            seconds=time.monotonic() - began,
            throughput=throughput,
        )


# ------------------------------------------------------------------------------------------------------ inputs


def _opened(location: Any, name: str) -> Located:
    """A checkpoint, or an adapter if it is none."""
    with _named():
        try:
            return open_checkpoint(location, role=ROLES[name])
        except WrongInputError as error:
            refused = error
        try:
            return open_checkpoint(location, role="adapter")
        except InputError:
            raise type(refused)(refused.message, hint="give a model or an adapter, whole") from refused


@contextmanager
def _named() -> Iterator[None]:
    """Let an error name A or B, and not the parts that they play where they are read."""
    try:
        yield
    except InputError as error:
        for name, role in ROLES.items():
            if error.message.startswith(f"{role}: "):
                raise type(error)(f"{name}: {error.message.removeprefix(f'{role}: ')}", hint=error.hint) from error
        raise


def _described(file: Checkpoint, seen: Checkpoint) -> dict[str, Any]:
    metas = seen.metas().values()
    hidden = len(file.metas()) - len(metas)
    return {
        "location": file.location,
        "tensors": len(metas),
        "bytes": sum(meta.nbytes for meta in metas),
        "dtypes": sorted({meta.stored_as for meta in metas}),
        **({"tensors of codes and scales": hidden} if hidden > 0 else {}),
    }


def _same_files(a: Located, b: Located) -> dict[str, str]:
    """What is told of B where it is A itself: that the two are equal is then no news."""
    ours, theirs = ([file.resolve() if isinstance(file, Path) else file for file in one.files] for one in (a, b))
    return {"the same files as": "A"} if ours and ours == theirs else {}


def _crew(a: Located, b: Located, asking: Asking, jobs: int | None, progress: Progress | None) -> _Crew:
    """Both as numbers, under names that can be paired, and what is to be done."""
    ours, theirs = unwrapped(decoded(a, b)[0], decoded(b, a)[0])
    ours = realigned(ours, theirs)
    pairs = make_pairs(ours, theirs, asking.include, asking.exclude)
    return _Crew(a=ours, b=theirs, pairs=pairs, jobs=jobs, progress=progress)


# ------------------------------------------------------------------------------------------------------ the pass


@dataclass(frozen=True, slots=True, kw_only=True)
class _Crew:
    """Two opened checkpoints, and whoever compares them."""

    a: Checkpoint
    b: Checkpoint
    pairs: Pairs
    jobs: int | None
    progress: Progress | None
    done: dict[int, Entry] = field(default_factory=dict)

    def compared(self) -> tuple[tuple[Entry, ...], Throughput | None]:
        """Every entry, in the order in which they are told, and how fast they were compared."""
        plan, places = self.pairs.plan, range(len(self.pairs.pairs))
        todo = [item(plan, place) for place in places]
        sizes = sizes_of(plan, todo)
        workers = self._workers(sizes)
        engine = registry.load("engines")["local"]
        with (
            one_thread(),
            self._watched(sum(sizes)) as advance,
            metered(plan, todo, self.a, self.b, workers=min(workers, cores())) as meter,
        ):

            def remember(place: int, entry: Entry) -> None:
                """Tell whoever watches."""
                advance(sizes[place])
                meter.done(todo[place])

            found = engine.run(self._entry, places, workers, remember)
        every = sorted((*found, *self.pairs.rest), key=lambda one: STATUSES.index(one.status))
        return tuple(every), meter.throughput

    def _workers(self, sizes: Sequence[int]) -> int:
        files = [file for one in (self.a, self.b) for file in getattr(one, "files", ())]
        waits = any(not isinstance(file, Path) or is_plain(file) for file in files)
        small = sum(sizes) < SMALL * len(sizes)
        return 1 if small and not waits else self.jobs or cores()

    def _watched(self, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return self.progress(total, "comparing", "B") if self.progress else nullcontext(lambda _: None)

    def _entry(self, place: int) -> Entry:
        """One pair, compared; what cannot be read is told with the reason."""
        pair = self.pairs.pairs[place]
        try:
            with _named():
                return self._compared(pair)
        except InputError as error:
            return replace(pair.entry, status="unread", reason=error.message)

    def _compared(self, pair: Pair) -> Entry:
        entry, a, b = pair.entry, pair.entry.a, pair.entry.b
        assert a is not None
        assert b is not None
        if a.shape != b.shape and entry.rows is None:
            return replace(entry, status="reshaped")
        if (same := self._same_codes(entry)) is not None:
            sizes = Sizes(elements=a.numel, counted=False)
            return replace(entry, status="unchanged" if same else "changed", sizes=sizes)
        stacked = len(a.shape) > 2
        x, y = matrix(self.a, a.name, stacked), matrix(self.b, b.name, stacked)
        height = prod(a.shape[1:-1]) if stacked else 1
        rows = int(x.shape[0]) if entry.rows is None else entry.rows * height
        return _judged(entry, compare(x, y, rows, a.shape))

    def _same_codes(self, entry: Entry) -> bool | None:
        """Whether both keep the same codes, where both keep codes of one kind; None: their numbers have to tell."""
        assert entry.a is not None
        assert entry.b is not None
        ours, theirs = stored_as(self.a, entry.a.name), stored_as(self.b, entry.b.name)
        if ours is None or theirs is None or not entry.a.codes or entry.a.codes != entry.b.codes:
            return None
        left, right = ours.parts(), theirs.parts()
        if left.keys() == right.keys() and all(_same(part, right[role]) for role, part in left.items()):
            return True
        return False if entry.a.sealed or entry.b.sealed else None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and same_bits(one, other)


def _judged(entry: Entry, sizes: Sizes) -> Entry:
    """The entry of a pair that was compared."""
    assert entry.a is not None
    assert entry.b is not None
    if entry.rows is not None:
        return replace(entry, status="reshaped", sizes=sizes)
    if entry.a.stored_as != entry.b.stored_as:
        conversion = _conversion(sizes)
        reason = f"nobody computes with {entry.a.dtype} and {entry.b.dtype}" if conversion == "unknown" else ""
        return replace(entry, status="retyped", sizes=sizes, conversion=conversion, reason=reason)
    # Codes that stand for the same numbers are not the same bits.
    unchanged = not sizes.differing and not entry.a.codes
    return replace(entry, status="unchanged" if unchanged else "changed", sizes=sizes)


def _conversion(sizes: Sizes) -> Conversion:
    if not sizes.counted:
        return "unknown"
    if not sizes.numbers:
        return "equal"
    return "rounded" if sizes.to_b else "rounded-back" if sizes.to_a else "differs"


def _shown(
    shows: Sequence[Asked], entries: Sequence[Entry], crew: _Crew, asking: Asking
) -> tuple[tuple[Shown, ...], int]:
    """The values that --show asks for, and of how many tensors more it does."""
    meant = [(one, entry) for one in shows for entry in chosen(one, entries)]
    kept = meant if asking.every else meant[:TENSORS]
    return tuple(show(one, entry, crew.a, crew.b) for one, entry in kept), len(meant) - len(kept)

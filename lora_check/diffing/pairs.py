"""Headers of A and B -> what is to be compared with what; every tensor of both is in exactly one entry.

The plan is that of a check without an adapter, so names are paired as `report` pairs them: through the layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from lora_check import registry
from lora_check.assembled import Region
from lora_check.diffing.nouns import Entry
from lora_check.links import Piece, Realigned
from lora_check.plan import make_plan
from lora_check.types import Checkpoint, Pairing, Plan, TensorMeta

WRAPPER = "base_model.model."
"""What a PEFT model puts before every name of the model that it wraps."""

REBUILT = "a model of the other's configuration has no place for it, or computes it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One tensor of each; `entry` is what the headers say of them."""

    pairing: Pairing
    entry: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """plan, pairs   what is read, the pairs in the order of the plan's pairings          rest   what is not"""

    plan: Plan
    pairs: tuple[Pair, ...]
    rest: tuple[Entry, ...]


def unwrapped(a: Checkpoint, b: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Both, without the prefix of PEFT's wrapper where only one of them has it on all its names."""
    ours, theirs = _wrapped(a), _wrapped(b)
    return _without(a) if ours and not theirs else a, _without(b) if theirs and not ours else b


def _wrapped(checkpoint: Checkpoint) -> bool:
    names = checkpoint.metas()
    return bool(names) and all(name.startswith(WRAPPER) for name in names)


def _without(checkpoint: Checkpoint) -> Checkpoint:
    metas = {name.removeprefix(WRAPPER): meta for name, meta in checkpoint.metas().items()}
    pieces = {name: (Piece(source=meta.name, taken=Region(), placed=Region()),) for name, meta in metas.items()}
    return Realigned(checkpoint, pieces, {name: replace(meta, name=name) for name, meta in metas.items()})


def make_pairs(a: Checkpoint, b: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Pairs:
    """Pair the tensors of two checkpoints.

    include, exclude   glob patterns on the names of either; what they leave out is skipped
    raises             WrongInputError: one of them is GGUF, and its names cannot be paired
    """
    plan, longer = make_plan(a, (), b), {name: WRAPPER + name for one in (a, b) for name in _stripped(one)}
    every = [_pair(one, plan, longer) for one in plan.pairings] + [*_tied(plan)]
    alone = [replace(one, other=one.other or longer.get(one.name, "")) for one in _alone(plan)]
    chosen = [one for one in every if selected(one.entry.names, include, exclude)]
    left = [one.entry for one in every if not selected(one.entry.names, include, exclude)]
    return Pairs(
        plan=replace(plan, pairings=tuple(one.pairing for one in chosen)),
        pairs=tuple(chosen),
        rest=tuple(_filtered(one, include, exclude) for one in (*alone, *left)),
    )


def _stripped(checkpoint: Checkpoint) -> list[str]:
    """Names that `unwrapped` made."""
    pieces: Mapping[str, Sequence[Piece]] = getattr(checkpoint, "pieces", {})
    return [name for name, made in pieces.items() if made[0].source == WRAPPER + name]


def selected(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a tensor of these names is asked for."""
    wanted = not include or any(matches(names, glob) for glob in include)
    return wanted and not any(matches(names, glob) for glob in exclude)


def matches(names: Sequence[str], glob: str) -> bool:
    """Whether a pattern means one of these names; upper and lower case are two things."""
    return any(fnmatchcase(name, glob) for name in names)


def _filtered(one: Entry, include: Sequence[str], exclude: Sequence[str]) -> Entry:
    return one if selected(one.names, include, exclude) else replace(one, status="skipped")


def family(name: str) -> str:
    """The module's own name: 'q_proj' of model.layers.0.self_attn.q_proj.weight."""
    return (name.rpartition(".")[0] or name).rsplit(".", 1)[-1]


# ------------------------------------------------------------------------------------------------------ pairs


def _pair(one: Pairing, plan: Plan, longer: Mapping[str, str]) -> Pair:
    assert one.base is not None, one.merged.name
    name, doubled = one.merged.name, one.merged.name in plan.doubled
    other = plan.renamed.get(name) or (one.base.name if one.base.name != name else longer.get(name, ""))
    return Pair(pairing=one, entry=_entry(name, one.base, one.merged, other=other, tied="A" if doubled else ""))


def _tied(plan: Plan) -> Iterator[Pair]:
    """Heads of A that B has in its embedding: the two are compared."""
    resolve, config = registry.load("layouts")["tied-head"].resolve, plan.merged_config or plan.base_config
    for name in plan.dropped:
        found = resolve(name, plan.merged_metas, config)
        if found is not None and found != name:
            a, b = plan.base_metas[name], plan.merged_metas[found]
            entry = _entry(name, a, b, other=found, tied="B")
            yield Pair(pairing=Pairing(merged=b, base=a, steps=(), module=name.rpartition(".")[0]), entry=entry)


def _entry(name: str, a: TensorMeta, b: TensorMeta, *, other: str, tied: str) -> Entry:
    """What the headers say of a pair; it counts as unread until it was compared."""
    rows = min(a.shape[0], b.shape[0]) if _share_rows(a.shape, b.shape) else None
    return Entry(name=name, status="unread", family=family(name), a=a, b=b, other=other, tied=tied, rows=rows)


def _share_rows(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes differ in the number of rows only, and there are some."""
    return a != b and len(a) > 1 and a[1:] == b[1:] and 0 not in (*a, *b)


def _alone(plan: Plan) -> Iterator[Entry]:
    """What has nothing to be compared with: names that one of them lacks, and shapes that have no rows in common."""
    compared = {pair.entry.name for pair in _tied(plan)}
    for name in (*plan.missing, *plan.dropped):
        if name not in compared:
            reason = REBUILT if name in plan.dropped else ""
            yield Entry(name=name, status="only in A", family=family(name), a=plan.base_metas[name], reason=reason)
    for name in (*plan.extra, *plan.computed):
        reason = REBUILT if name in plan.computed else ""
        yield Entry(name=name, status="only in B", family=family(name), b=plan.merged_metas[name], reason=reason)
    for one in plan.reshaped:
        other = plan.renamed.get(one.name, "")
        a, b = plan.base_metas.get(one.name) or plan.base_metas[other], plan.merged_metas[one.name]
        yield Entry(name=one.name, status="reshaped", family=family(one.name), a=a, b=b, other=other)

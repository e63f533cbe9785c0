"""Several LoRA adapters as the one that PEFT's add_weighted_adapter makes of them.

The new adapter holds the factors of all, told apart by number: 'A0', 'B0', 'A1' ...; a recipe combines them where they
are multiplied. Its alpha is its rank and its patterns are empty: its scale is 1, or sqrt(r) where it inherits rsLoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from lora_check import registry
from lora_check.adapters.scale import scale_of
from lora_check.errors import UsageError
from lora_check.types import Adapter, Checkpoint, Combination, Options, Part, TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

FACTORS = ("A", "B", "embedding_A", "embedding_B")


class _Several:
    """The tensors of several checkpoints under one roof, each name led by the number of its checkpoint."""

    def __init__(self, members: Sequence[Checkpoint]) -> None:
        self.members = members
        self._metas = {
            numbered(index, name): replace(meta, name=numbered(index, name))
            for index, member in enumerate(members)
            for name, meta in member.metas().items()
        }

    @property
    def location(self) -> str:
        return " + ".join(member.location for member in self.members)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.members[0].config

    def metas(self) -> Mapping[str, TensorMeta]:
        """All names, each with its number."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """The tensor, from the checkpoint that its number tells."""
        index, _, own = name.partition(":")
        return self.members[int(index)].read(own)

    def close(self) -> None:
        """Close all of them."""
        for member in self.members:
            member.close()


def numbered(index: int, name: str) -> str:
    """'0:base_model...': unique among several adapters."""
    return f"{index}:{name}"


def parse_combination(text: str) -> tuple[Combination, Options]:
    """A kind, or a kind with options: 'ties:density=0.5,majority_sign_method=frequency'.

    raises   UsageError: an unknown kind, an unknown option, a value that is none
    """
    kind, _, said = text.partition(":")
    known = registry.load("combinations")
    if kind not in known:
        raise UsageError(f"{kind!r} is no combination", hint=f"known: {', '.join(known)}")
    pairs = [one.partition("=") for one in said.split(",") if one]
    return known[kind], Options(**dict(_option(key.strip(), value.strip()) for key, _, value in pairs))


def _option(key: str, value: str) -> tuple[str, Any]:
    kinds: dict[str, Any] = {one.name: type(getattr(Options(), one.name)) for one in fields(Options)}
    if key not in kinds:
        raise UsageError(f"a combination has no option {key!r}", hint=f"options: {', '.join(kinds)}")
    try:
        return key, kinds[key](value)
    except ValueError:
        raise UsageError(f"{key}={value!r} is no {kinds[key].__name__}", hint="give a number") from None


def combine(adapters: Sequence[Adapter], text: str) -> Adapter:
    """The adapter that add_weighted_adapter makes of these, weighted as they are.

    raises   UsageError: the combination, or an adapter that cannot be combined
    """
    combination, options = parse_combination(text)
    if len(adapters) == 1:
        combination = registry.load("combinations")["linear"]
    strange = [one for one in adapters if one.config.method != "LORA"]
    if strange:
        raise UsageError(
            f"an adapter of type {strange[0].config.method} cannot be combined: {strange[0].location}",
            hint="leave --combination out to merge the adapters one after the other",
        )
    first, rank = adapters[0].config, _rank(adapters, combination, options)
    raw = {**first.raw, "combination": combination, "options": replace(options, svd_rank=rank)}
    config = replace(first, rank=rank, alpha=rank, rank_pattern={}, alpha_pattern={}, targets=(), raw=raw)
    return replace(
        adapters[0],
        config=replace(
            config, producer="", unsupported=(*_reasons(adapters), *_refusal(combination, adapters, options))
        ),
        checkpoint=_Several([one.checkpoint for one in adapters]),
        parts=tuple(_parts(adapters)),
        orphans=tuple(numbered(index, name) for index, one in enumerate(adapters) for name in one.orphans),
        weight=1.0,
        members=tuple(adapters),
    )


def _parts(adapters: Sequence[Adapter]) -> Iterator[Part]:
    for index, adapter in enumerate(adapters):
        for part in adapter.parts:
            role = f"{part.role}{index}" if part.role in FACTORS else part.role
            yield replace(part, tensor=numbered(index, part.tensor), role=role)


def _rank(adapters: Sequence[Adapter], combination: Combination, options: Options) -> int:
    ranks = [max([one.config.rank, *one.config.rank_pattern.values()]) for one in adapters]
    if combination.of == "ranks":
        return sum(ranks)
    return options.svd_rank or max(ranks)


def _refusal(combination: Combination, adapters: Sequence[Adapter], options: Options) -> list[str]:
    """Why this kind cannot be recomputed for these adapters."""
    ranks = {max([one.config.rank, *one.config.rank_pattern.values()]) for one in adapters}
    if combination.refuses:
        return [combination.refuses]
    if combination.of == "factors" and len(ranks) > 1:
        return [f"PEFT combines adapters of one rank only by {combination.name!r}, and these have {sorted(ranks)}"]
    return [] if 0 < options.density <= 1 else [f"a density of {options.density} keeps nothing"]


def _reasons(adapters: Sequence[Adapter]) -> list[str]:
    """What add_weighted_adapter leaves out or refuses, once each."""
    found = [reason for one in adapters for reason in one.config.unsupported]
    roles = {part.role for one in adapters for part in one.parts}
    if "m" in roles:
        found.append("DoRA magnitudes are not combined: PEFT takes the norms of the base anew")
    if roles - {*FACTORS, "m"}:
        found.append("only factors are combined, and an adapter carries biases, rows or whole tensors beside them")
    return list(dict.fromkeys(found))


def shares(adapter: Adapter, module: str) -> Mapping[str, Any]:
    """What the combining recipes need to know of one module: each member's weight and scale."""
    scales = [scale_of(replace(one, weight=1.0), module) for one in adapter.members]
    return {
        **adapter.config.raw,
        "scales": tuple(one.value for one in scales),
        "weights": tuple(one.weight for one in adapter.members),
    }

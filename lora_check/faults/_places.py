"""Where a tensor lies: its layer, its expert, and what it is called beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lora_check.faults._cases import copies
from lora_check.faults._findings import listed
from lora_check.types import Case, LoadedStep, Peer


class Place(NamedTuple):
    """The path of a tensor with its layer and its expert taken out of it; None where it has none."""

    path: str
    layer: int | None
    expert: int | None


def place(tensor: str) -> Place:
    """('model.layers.*.mlp.experts.*.w1.weight', 3, 5) of model.layers.3.mlp.experts.5.w1.weight.

    The layer is the first number of the path; the expert the one that follows a word with 'expert' in it.
    """
    words = tensor.split(".")
    numbers = [index for index, word in enumerate(words) if word.isdecimal()]
    expert = next((index for index in numbers if index and "expert" in words[index - 1]), None)
    layer = next((index for index in numbers if index != expert), None)
    path = ".".join("*" if index in (layer, expert) else word for index, word in enumerate(words))
    return Place(path, *(None if index is None else int(words[index]) for index in (layer, expert)))


def likely_sources(own: int, numbers: Sequence[int], limit: int) -> list[int]:
    """The numbers that `own` may have been mistaken for, likeliest first.

    numbers   all there are, in order, `own` among them

    The one before and the one after, the order turned round, the order of the names as text (1, 10, 11, 2) and its
    reverse, counted from the start of each half, quarter or eighth; then the nearest ones.
    """
    count, index = len(numbers), numbers.index(own)
    as_text = sorted(numbers, key=str)
    found = [index - 1, index + 1, count - 1 - index]
    guesses = [numbers[i] for i in found if 0 <= i < count] + [as_text[index], numbers[as_text.index(own)]]
    for parts in (2, 4, 8):
        if count % parts == 0 and count > parts:
            size = count // parts
            guesses += [numbers[index % size], *(numbers[i] for i in (index - size, index + size) if 0 <= i < count)]
    nearest = sorted(numbers, key=lambda one: abs(one - own))
    return [one for one in dict.fromkeys([*guesses, *nearest]) if one != own][:limit]


def with_factors_of(case: Case, peers: Iterable[tuple[Peer, Mapping[str, Any]]]) -> tuple[Case, ...]:
    """The case with the steps of each of these peers in place of its own, if their factors are not the same numbers."""
    found = []
    for peer, told in peers:
        steps = peer.steps()
        if not copies(case) and len(steps) == len(case.steps) and not _alike(steps, case.steps):
            found.append(replace(case, steps=steps, told={**told, "holds": peer.module}))
    return tuple(found)


def _alike(one: Sequence[LoadedStep], other: Sequence[LoadedStep]) -> bool:
    return all(
        a.s == b.s
        and a.factors.keys() == b.factors.keys()
        and all(x.equal(b.factors[role]) for role, x in a.factors.items())
        for a, b in zip(one, other, strict=True)
    )


def beside(case: Case, number: Callable[[Place], int | None]) -> Iterator[tuple[int, Peer]]:
    """The peers that differ from the tensor by one number of their path and nothing else."""
    own = place(case.name)
    for peer in case.peers:
        there = place(peer.tensor)
        same = there._replace(layer=None, expert=None) == own._replace(layer=None, expert=None)
        differing = sum((there.layer != own.layer, there.expert != own.expert))
        found = number(there)
        if same and differing == 1 and found is not None and found != number(own):
            yield found, peer


def orders(own: int, of: int, numbers: Sequence[int], noun: str) -> list[str]:
    """Each rule by which the delta of number `of` comes to lie at number `own`, as a phrase."""
    index, count, offset = numbers.index(own), len(numbers), of - own
    which = {-1: "before it", 1: "after it"}.get(offset, f"{abs(offset)} {'before' if offset < 0 else 'after'} it")
    found = {f"each {noun} holds the delta of the {noun} {which}": of} if abs(offset) == 1 else {}
    found[f"deltas of the {noun}s in reverse order"] = numbers[count - 1 - index]
    found[f"deltas of the {noun}s in the order of their names as text"] = sorted(numbers, key=str)[index]
    for parts in (2, 4, 8):
        if count % parts == 0 and count > parts:
            found[f"deltas of the {noun}s counted anew in each of {parts} parts"] = numbers[index % (count // parts)]
    found |= {f"each {noun} holds the delta of the {noun} {which}": of}
    return [phrase for phrase, number in found.items() if number == of]


def order_told(told: Sequence[Mapping[str, Any]], noun: str) -> str:
    """The rule that all the tensors follow; of several that none unites, the first two."""
    common = [phrase for phrase in told[0]["orders"] if all(phrase in one["orders"] for one in told)]
    if common:
        return str(common[0])
    examples = [f"{noun} {one['own']} holds the delta of {noun} {one['of']}" for one in told]
    return f"{noun}s hold one another's deltas ({listed(dict.fromkeys(examples), 3)})"

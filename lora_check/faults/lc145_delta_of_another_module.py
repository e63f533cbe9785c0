"""LC145 delta-of-another-module

What it is
A target holds the delta of another module of its layer: gate that of up, k that of v, q that of o.

How it happens
A table that renames modules (w1, w2, w3; q, k, v, o) has two of them exchanged, or an exporter that splits or fuses
projections takes the parts in another order. Shapes agree, so nothing complains.

How it is told
W' = W + P reproduces every element, with P the delta of another target of the same layer, and of the same expert, whose
shape agrees.

Evidence
holds: the module whose delta it is.

What to do
Mend the table of names by which the merge finds the factors of a module, and merge again.

Seen in
thinking-machines-lab/tinker-cookbook#459, hiyouga/LlamaFactory#3376, huggingface/peft#372
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_check.faults._findings import listed
from lora_check.faults._places import Place, place, with_factors_of
from lora_check.faults._rows import family
from lora_check.types import Case, ValueFault

MOST = 8
"""Modules of one layer and one shape that are tried."""


def inject(case: Case) -> tuple[Case, ...]:
    """W' = W + P, P of another module of the layer."""
    own = place(case.name)
    there = [peer for peer in case.peers if _beside(place(peer.tensor), own)]
    there.sort(key=lambda peer: -_shared(peer.tensor, case.name))
    told = ((peer, {"own": family(case.name), "of": family(peer.tensor)}) for peer in there[:MOST])
    return with_factors_of(case, told)


def _beside(there: Place, own: Place) -> bool:
    return there.path != own.path and (there.layer, there.expert) == (own.layer, own.expert)


def _shared(one: str, other: str) -> int:
    """How many words two paths begin with in common."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(one))


def tell(told: Sequence[Mapping[str, Any]]) -> str:
    """Who holds whose."""
    pairs = Counter((str(one["own"]), str(one["of"])) for one in told)
    if len(pairs) == 2 and all((of, own) in pairs for own, of in pairs):
        return f"{listed(sorted({own for own, _ in pairs}))} hold each other's delta"
    return listed([f"{own} holds the delta of {of}" for (own, of), _ in pairs.most_common()], 3)


FAULT = ValueFault(
    code="LC145",
    name="delta-of-another-module",
    severity="error",
    summary="the delta of another module of the layer",
    help="mend the table of names by which the merge finds the factors of a module, and merge again",
    inject=inject,
    tell=tell,
    causes=("M14", "M20"),
)

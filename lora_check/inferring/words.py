"""What all changes together are, in words: 'a LoRA merge of rank 8 in q_proj and v_proj; norms too'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lora_check.inferring.outcome import Change, Inference, Kind
from lora_check.rounding import MOST

MATRICES = (Kind.LOW_RANK, Kind.FULL, Kind.RESCALED, Kind.RESCALED_LOW_RANK)
NAMED = 8
"""Families that are named; of more, how many there are."""

SUMMED = (
    "ranks of several adapters add up: one adapter of rank 8 writes the same as two of rank 4, and neither scale nor "
    "alpha can be told from the product"
)


def says(inference: Inference) -> str:
    """One phrase for the whole of MERGED."""
    parts = [*_matrices(inference), *_vectors(inference), *_rows(inference), *_names(inference), *_untold(inference)]
    if not parts:
        return "a copy of BASE"
    return "; ".join(parts)


def remarks(inference: Inference) -> list[str]:
    """What cannot be told, and what a reader may take for more than it is."""
    low = inference.of(Kind.LOW_RANK)
    told = [SUMMED] if low else []
    likely = [one for one in low if one.confidence == "likely"]
    if likely:
        told.append(
            f"in {len(likely)} of {len(low)} modules the weakest direction is above the floor and below the bound"
        )
    echoes = [one for one in low if one.because]
    if echoes:
        told.append(f"in {len(echoes)} modules further directions are echoes of rounding so faint a change")
    large = [one for one in inference.of(Kind.FULL) if one.because]
    if large:
        told.append(f"in {len(large)} modules {large[0].because}")
    if low:
        told.append("a direction below the floor would not be seen: the adapter may have had more of them")
    return told


def _matrices(inference: Inference) -> list[str]:
    low, full = inference.of(Kind.LOW_RANK), inference.of(Kind.FULL)
    parts = []
    if len(low) > len(full):
        parts.append(f"a LoRA merge of {ranks(low)} in {families(low)}")
        parts += [f"trained in full: {families(full)}"] if full else []
    elif full:
        whole = not any(one.kind is Kind.COPY and len(one.shape) > 1 for one in inference.changes)
        parts.append(f"a full fine-tune{'' if whole else f' of {families(full)}'}, not a LoRA merge")
        parts += [f"of low rank alone ({ranks(low)}): {families(low)}"] if low else []
    both = inference.of(Kind.RESCALED_LOW_RANK)
    if both:
        parts.append(f"rows rescaled beside a change of {ranks(both)}, as DoRA merges, in {families(both)}")
    scaled = inference.of(Kind.RESCALED)
    if scaled:
        parts.append(f"rows or columns rescaled, as IA3 merges, in {families(scaled)}")
    return parts


def _vectors(inference: Inference) -> list[str]:
    vectors, others = inference.of(Kind.VECTOR), inference.of(*MATRICES)
    biases = [one for one in vectors if one.is_bias]
    norms = [one for one in vectors if one.is_norm]
    rest = [one for one in vectors if one not in biases and one not in norms]
    kinds = [name for name, members in (("biases", biases), ("norms", norms)) if members]
    named = [*kinds, *([families(rest)] if rest else [])]
    if not named:
        return []
    return [f"{_joined(named)} too"] if others else [f"only {_joined(named)}"]


def _rows(inference: Inference) -> list[str]:
    changed = [f"{one.rows} of {one.shape[0]} rows of {one.family} changed" for one in inference.of(Kind.ROWS)]
    new = [f"{one.rows} new {_plural('row', one.rows)} in {one.family}" for one in inference.of(Kind.NEW)]
    return _few([*changed, *new])


def _names(inference: Inference) -> list[str]:
    gone, more = len(inference.missing), len(inference.extra)
    told = [f"{gone} {_plural('tensor', gone)} of BASE missing"] if gone else []
    return [*told, *([f"{more} {_plural('tensor', more)} that BASE lacks"] if more else [])]


def _untold(inference: Inference) -> list[str]:
    faint, unclear = inference.of(Kind.FAINT), inference.of(Kind.UNCLEAR)
    told = [f"changed, but too little is left to tell a rank: {families(faint)}"] if faint else []
    return [*told, *([f"changed, and nothing can be told: {families(unclear)}"] if unclear else [])]


def ranks(changes: Sequence[Change]) -> str:
    """'rank 8', 'rank 8 (in 110 of 112 modules, 5 to 7 in the others)', or 'ranks 3 to 9'."""
    counts = Counter(one.rank for one in changes)
    (rank, most), every = counts.most_common(1)[0], sorted(counts)
    if len(every) == 1:
        return f"rank {rank}"
    if most <= MOST * len(changes):
        return f"ranks {every[0]} to {every[-1]}"
    others = [one for one in every if one != rank]
    span = f"{others[0]}" if len(others) == 1 else f"{others[0]} to {others[-1]}"
    return f"rank {rank} (in {most} of {len(changes)} modules, {span} in the others)"


def families(changes: Iterable[Change]) -> str:
    """Their families, named."""
    found = list(dict.fromkeys(one.family for one in changes))
    return _joined(found) if len(found) <= NAMED else f"{len(found)} kinds of module"


def _few(parts: Sequence[str]) -> list[str]:
    return [*parts[:NAMED], *([f"and {len(parts) - NAMED} more such tensors"] if len(parts) > NAMED else [])]


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"

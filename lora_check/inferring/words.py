"""What all changes together are, in words: 'a LoRA merge of rank 8 in q_proj and v_proj; norms too'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lora_check.inferring.outcome import Change, Inference, Kind
from lora_check.rounding import MOST

MATRICES = (Kind.LOW_RANK, Kind.OPEN, Kind.FULL, Kind.RESCALED, Kind.RESCALED_LOW_RANK)
NAMED = 8
"""Families that are named; of more, how many there are."""

SUMMED = (
    "ranks of several adapters add up: one adapter of rank 8 writes the same as two of rank 4, and neither scale nor "
    "alpha can be told from the product"
)
ALIKE = "a fine-tune whose updates stay in few directions, as GaLore's do, writes what an adapter of their rank would"

DECODED = "a base that was quantised and decoded again differs in full too, and a LoRA merge into it looks like this"


def says(inference: Inference) -> str:
    """One phrase for the whole of MERGED."""
    parts = [*_matrices(inference), *_vectors(inference), *_rows(inference), *_names(inference), *_untold(inference)]
    if not parts:
        return "a copy of BASE"
    return "; ".join(parts)


def remarks(inference: Inference) -> list[str]:
    """What cannot be told, and what a reader may take for more than it is."""
    low = inference.of(Kind.LOW_RANK)
    told = [SUMMED, ALIKE] if inference.is_lora else []
    if inference.of(Kind.FULL) and not inference.of(Kind.VECTOR):
        told.append(DECODED)
    likely = [one for one in low if one.certain < one.rank]
    if likely:
        told.append(
            f"in {len(likely)} of {len(low)} modules the weakest direction is above the floor and below the bound"
        )
    loose = [one for one in low if one.hidden]
    if loose:
        where = f"in {len(loose)} of {len(low)} modules"
        told.append(f"{where} further directions lie below the floor and above what rounding explains")
    twice = [one for one in low if one.stores > 1]
    if twice:
        where, times = f"in {len(twice)} of {len(low)} modules", span(one.stores for one in twice)
        told.append(f"{where} what is left is the noise of {times} stores: the change came in parts")
    echoes = [one for one in low if one.because]
    if echoes:
        told.append(f"in {len(echoes)} modules further directions are echoes of rounding so faint a change")
    large = [one for one in inference.of(Kind.FULL) if one.because]
    if large:
        told.append(f"in {len(large)} modules {large[0].because}")
    if low:
        told.append("a direction that is weaker than the noise would not be seen: there may have been more of them")
    return told


def _matrices(inference: Inference) -> list[str]:
    parts = _full(inference) if inference.is_full else _parts(inference)
    both = inference.of(Kind.RESCALED_LOW_RANK)
    if both:
        parts.append(f"rows rescaled beside a change of {ranks(both)}, as DoRA merges, in {families(both)}")
    scaled = inference.of(Kind.RESCALED)
    if scaled:
        parts.append(f"rows or columns rescaled, as IA3 merges, in {families(scaled)}")
    return parts


def _full(inference: Inference) -> list[str]:
    """Of a full fine-tune; the matrices in which it looks like something less."""
    full, ended = inference.of(Kind.FULL), [one for one in inference.changes if one.ends]
    low = [f"of low rank alone ({ranks(ended)}): {families(ended)}"] if ended else []
    if len(full) <= len(inference.endless) - len(full):
        seen = f"every matrix changed, in {families(inference.endless)} by directions without an end above the noise"
        return [f"a full fine-tune by all signs, not a LoRA merge: {seen}", *low]
    whole = not any(one.kind is Kind.COPY and len(one.shape) > 1 for one in inference.changes)
    return [f"a full fine-tune{'' if whole else f' of {families(full)}'}, not a LoRA merge", *low]


def _parts(inference: Inference) -> list[str]:
    """Of anything else: what is of low rank, what is not, and what lies between."""
    low, between, full = (inference.of(kind) for kind in (Kind.LOW_RANK, Kind.OPEN, Kind.FULL))
    parts = []
    if low:
        parts.append(f"a LoRA merge of {ranks(low)} in {families(low)}" if inference.is_lora else _low(low))
    if between:
        least = f"at least {span(one.rank for one in between)} directions"
        parts.append(f"changed in {least}, whose end is not seen, in {families(between)}: in full, or of a high rank")
    return [*parts, *([f"trained in full: {families(full)}"] if full else [])]


def _low(low: Sequence[Change]) -> str:
    """Of low rank, and not more than that."""
    loose = any(one.hidden for one in low)
    more = " above the noise of storing, and weaker ones that sink into it" if loose else " above the noise of storing"
    count = span(one.rank for one in low)
    directions = f"{count} {_plural('direction', 1 if count == '1' else 2)}{more}"
    return f"of low rank in {families(low)}: {directions}; a LoRA merge or another fine-tune in few directions"


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
    others = span(one for one in every if one != rank)
    return f"rank {rank} (in {most} of {len(changes)} modules, {others} in the others)"


def span(numbers: Iterable[int]) -> str:
    """'8', or '3 to 9'."""
    every = sorted(set(numbers))
    return f"{every[0]}" if len(every) == 1 else f"{every[0]} to {every[-1]}"


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

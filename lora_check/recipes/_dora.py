"""W' = m / |V| V, V = W + delta: the part that every DoRA recipe shares."""

from __future__ import annotations

from lora_check.types import Factors, Hand, Numbers


def by_rows(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """(m / |V|_row) V: one magnitude for each output, outputs along the rows.   m (out,) or (1, out, 1...)."""
    from lora_check.ball import norm  # here, so that a plan, which only asks what fits, loads no tensor library

    v = hand.keep(w + delta)
    m = factors["m"].reshape(-1)[rows].reshape(-1, 1)
    return hand.keep(m / hand.keep(norm(v))) * v


def by_columns(w: Numbers, delta: Numbers, factors: Factors, norms: Numbers, rows: slice, hand: Hand) -> Numbers:
    """(m / |V|_column) V: one magnitude for each column; the norms were gathered over all rows before."""
    m = factors["m"].reshape(1, -1)
    return hand.keep(m / hand.keep(norms)) * hand.keep(w + delta)


def moved(w: Numbers, delta: Numbers, hand: Hand) -> Numbers:
    """V = W + delta, whose column norms `by_columns` divides by."""
    return hand.keep(w + delta)

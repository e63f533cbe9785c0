"""Products of low-rank factors, rows at a time; shared by the plain and the DoRA recipes of each layer type."""

from __future__ import annotations

from lora_check.types import Factors, Numbers, Site


def out_in(factors: Factors, rows: slice) -> Numbers:
    """(B A)[rows] for a weight stored (out, in).   A (r, in), B (out, r)."""
    return factors["B"][rows] @ factors["A"]


def in_out(factors: Factors, rows: slice) -> Numbers:
    """(B A)^T[rows] for a weight stored (in, out), as transformers' Conv1D and every embedding are."""
    return factors["A"].T[rows] @ factors["B"].T


def convolution(factors: Factors, rows: slice) -> Numbers:
    """Sum over r of B[o, r] A[r, i, k...], flattened to (out, in k...).   A (r, in, k...), B (out, r, 1...)."""
    a, b = factors["A"], factors["B"]
    return b[rows].reshape(-1, int(b.shape[1])) @ a.reshape(int(a.shape[0]), -1)


def is_out_in(site: Site) -> bool:
    """A (r, in) and B (out, r) match a weight (out, in), and nothing says the layer keeps it as (in, out)."""
    pair = _in_and_out(site)
    return pair is not None and site.shape == pair[::-1] and not site.in_out


def is_in_out(site: Site) -> bool:
    """A (r, in) and B (out, r) match a weight (in, out); a square one needs to be told so by `in_out`."""
    pair = _in_and_out(site)
    return pair is not None and site.shape == pair and (pair[0] != pair[1] or bool(site.in_out))


def is_embedding(site: Site) -> bool:
    """lora_embedding_A (r, vocab) and lora_embedding_B (dim, r) match a weight (vocab, dim)."""
    a, b = site.roles.get("embedding_A", ()), site.roles.get("embedding_B", ())
    return len(a) == len(b) == 2 and (a[1], b[0]) == site.shape and a[0] == b[1]


def is_convolution(site: Site) -> bool:
    """A (r, in, k...) and B (out, r, 1...) match a weight (out, in, k...) of one group."""
    a, b, w = site.roles.get("A", ()), site.roles.get("B", ()), site.shape
    return len(w) > 2 and len(a) == len(b) == len(w) and a[1:] == w[1:] and b == (w[0], a[0], *(1 for _ in w[2:]))


def _in_and_out(site: Site) -> tuple[int, int] | None:
    """(in, out) as the two factors have it, if they are matrices of one rank."""
    a, b = site.roles.get("A", ()), site.roles.get("B", ())
    return (a[1], b[0]) if len(a) == len(b) == 2 and a[0] == b[1] else None

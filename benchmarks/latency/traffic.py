"""Bytes and FLOPs of an adapted forward, counted kernel by kernel, for each way to implement it.

A kernel computes `flops`, reads `weights` (base weights and factors: bytes that lie in memory before the call) and
moves `passing` (activations and intermediates: bytes that a cache may hold between two kernels).

Letters as in the nouns: T tokens, K inputs, N outputs, r rank, n distinct adapters in the batch; e bytes of an element
of the base, f of the adapter. What the base product itself moves, T K read and T N written, every implementation does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from benchmarks.latency.nouns import Cell
from lora_check.errors import InputError

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One adapted module in one forward: T, K, N, r, n as above.

    batch           sequences, of T / batch tokens each
    base, adapter   dtypes
    """

    T: float
    K: int
    N: int
    r: int
    n: int = 1
    batch: int = 1
    base: str = "bfloat16"
    adapter: str = ""

    @property
    def e(self) -> int:
        """Bytes of an element of the base and of the activations."""
        return width(self.base)

    @property
    def f(self) -> int:
        """Bytes of an element of the adapter."""
        return width(self.adapter or self.base)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One pass over data, whose products run at the rate of `dtype`; the rest in the head of this file."""

    about: str
    dtype: str
    flops: float = 0
    weights: float = 0
    passing: float = 0


def width(dtype: str) -> int:
    """Bytes of an element; raises InputError for a dtype that no workload has."""
    if dtype not in BYTES:
        raise InputError(f"no floor can be counted in {dtype!r}", hint=f"known are {', '.join(BYTES)}")
    return BYTES[dtype]


def of(cell: Cell, modules: Iterable[tuple[int, int]], adapter: str = "") -> tuple[Module, ...]:
    """The modules of a cell. modules: (N, K) of each. A batch of fewer sequences than adapters uses only so many."""
    n = min(cell.adapters, cell.batch)
    return tuple(
        Module(T=cell.tokens, K=inputs, N=outputs, r=cell.rank, n=n, batch=cell.batch, base=cell.dtype, adapter=adapter)
        for outputs, inputs in modules
    )


# --------------------------------------------------------------------------------------- kernels of implementations


def merged(m: Module) -> tuple[Kernel, ...]:
    """y = x W'^T: 2 T K N FLOPs, e (K N + T K + T N) bytes; with n adapters n such products, on T / n tokens each."""
    part = Kernel(
        about="product",
        dtype=m.base,
        flops=2 * m.T * m.K * m.N / m.n,
        weights=m.e * m.K * m.N,
        passing=m.e * m.T * (m.K + m.N) / m.n,
    )
    return (part,) * m.n


def fused(m: Module) -> tuple[Kernel, ...]:
    """All in one pass: 2 T (K N + r (K + N)) FLOPs, e (K N + T K + T N) + f n r (K + N) bytes.

    Over merged that is r (1/K + 1/N), bound by FLOPs or by weights alike: the least that an unmerged forward costs
    unless it merges inside.
    """
    return (
        Kernel(
            about="product with its adapter",
            dtype=m.base,
            flops=2 * m.T * (m.K * m.N + m.r * (m.K + m.N)),
            weights=m.e * m.K * m.N + m.f * m.n * m.r * (m.K + m.N),
            passing=m.e * m.T * (m.K + m.N),
        ),
    )


def base(m: Module) -> Kernel:
    """x W^T, once for all adapters: 2 T K N FLOPs, e (K N + T K + T N) bytes."""
    return Kernel(
        about="base product",
        dtype=m.base,
        flops=2 * m.T * m.K * m.N,
        weights=m.e * m.K * m.N,
        passing=m.e * m.T * (m.K + m.N),
    )


def shrink(m: Module) -> Kernel:
    """x A^T in the dtype of the adapter: reads T K and n r K, writes T r; 2 T K r FLOPs."""
    return Kernel(
        about="shrink",
        dtype=m.adapter or m.base,
        flops=2 * m.T * m.K * m.r,
        weights=m.f * m.n * m.r * m.K,
        passing=m.f * m.T * (m.K + m.r),
    )


def expand(m: Module, passes: int = 1) -> Kernel:
    """(x A^T) B^T in the dtype of the adapter: reads T r and n N r; T N written, or in two passes read and written."""
    return Kernel(
        about="expand" if passes == 1 else "expand into y",
        dtype=m.adapter or m.base,
        flops=2 * m.T * m.N * m.r,
        weights=m.f * m.n * m.r * m.N,
        passing=m.f * m.T * (m.r + passes * m.N),
    )


def elementwise(about: str, m: Module, moved: float) -> Kernel:
    """A pass that only moves bytes: its FLOPs never bind."""
    return Kernel(about=about, dtype=m.base, passing=moved)


def two(m: Module) -> tuple[Kernel, ...]:
    """The scale is folded into a factor, and the expand accumulates into y: it reads and writes T N."""
    return (base(m), shrink(m), expand(m, 2))


def eager(m: Module) -> tuple[Kernel, ...]:
    """y + (x A^T B^T) s as it is written: scaling reads and writes T N, the sum reads it twice and writes it once."""
    TN = m.T * m.N
    return (
        base(m),
        shrink(m),
        expand(m),
        elementwise("scale", m, 2 * m.f * TN),
        elementwise("add", m, (m.e + m.f + max(m.e, m.f)) * TN),
    )


def peft(m: Module) -> tuple[Kernel, ...]:
    """PEFT's forward: as eager, and where the adapter has another dtype the input is cast to it, and the sum back.

    Casting reads T K of e bytes and writes it of f; the sum comes in the wider dtype and is read and written once more.
    With n adapters in the batch see `mixed`.
    """
    if m.n > 1:
        return mixed(m)
    if m.f == m.e:
        return eager(m)
    first, *others = eager(m)
    into = elementwise("cast in", m, (m.e + m.f) * m.T * m.K)
    return (first, into, *others, elementwise("cast back", m, (max(m.e, m.f) + m.e) * m.T * m.N))


def mixed(m: Module) -> tuple[Kernel, ...]:
    """PEFT's mixed batch, for each adapter: gather its rows, shrink, expand, scale, y[rows] +=.

    Indexing reads and writes T K / n once; y[rows] is copied out, added to and copied back, 7 e T N / n bytes. Casts,
    where the dtypes differ, as in `peft`.
    """
    one = share(m)
    TK, TN = one.T * m.K, one.T * m.N
    kernels = [
        elementwise("gather rows", m, 2 * m.e * TK),
        shrink(one),
        expand(one),
        elementwise("scale", m, 2 * m.f * TN),
        elementwise("rows of y", m, 2 * m.e * TN),
        elementwise("add", m, 3 * m.e * TN),
        elementwise("put back", m, 2 * m.e * TN),
    ]
    if m.f != m.e:
        kernels.insert(1, elementwise("cast in", m, (m.e + m.f) * TK))
        kernels.insert(5, elementwise("cast back", m, (m.f + m.e) * TN))
    return (base(m), *kernels * m.n)


def looped(m: Module) -> tuple[Kernel, ...]:
    """For each adapter: gather its rows of x, shrink, expand, add to the rows of y: two reads and one write of T N."""
    one = share(m)
    kernels = (
        elementwise("gather rows", m, 2 * m.e * one.T * m.K),
        shrink(one),
        expand(one),
        elementwise("add to rows", m, 3 * m.e * one.T * m.N),
    )
    return (base(m), *kernels * m.n)


def gathered(m: Module) -> tuple[Kernel, ...]:
    """A[chosen], B[chosen] are written for every sequence, then two batched products, the second into y.

    Gathering reads n r K and writes batch r K (N for B); the products read those copies.
    """
    A, B = m.f * m.batch * m.r * m.K, m.f * m.batch * m.r * m.N
    T, dtype = m.T, m.adapter or m.base
    return (
        base(m),
        Kernel(about="gather A", dtype=dtype, weights=m.f * m.n * m.r * m.K, passing=A),
        Kernel(about="gather B", dtype=dtype, weights=m.f * m.n * m.r * m.N, passing=B),
        Kernel(about="shrink", dtype=dtype, flops=2 * T * m.K * m.r, passing=A + m.f * T * (m.K + m.r)),
        Kernel(about="expand into y", dtype=dtype, flops=2 * T * m.N * m.r, passing=B + m.f * T * (m.r + 2 * m.N)),
    )


def merge(m: Module) -> tuple[Kernel, ...]:
    """Merging inside each forward: W' = W + s B A reads K N and writes K N, 2 r K N FLOPs; then the product by W'."""
    KN = m.K * m.N
    factors = m.f * m.r * (m.K + m.N)
    merging = Kernel(
        about="merge", dtype=m.adapter or m.base, flops=2 * m.r * KN, weights=m.e * KN + factors, passing=m.e * KN
    )
    product = Kernel(
        about="product by W'", dtype=m.base, flops=2 * m.T * KN / m.n, passing=m.e * (KN + m.T * (m.K + m.N) / m.n)
    )
    return (merging, product) * m.n


def dora(m: Module) -> tuple[Kernel, ...]:
    """PEFT's DoRA: B A as a matrix (through an identity), the norms of W + s B A, then (m - 1) y + m s h onto y.

    Everything but the base product is in the dtype of the adapter. Forming the matrix: 2 K r (K + N) FLOPs, and passes
    over K N: W is cast, B A scaled, added to W, its norms taken; over T N one for each sign of the formula.
    """
    one = Module(T=m.K, K=m.K, N=m.N, r=m.r, base=m.base, adapter=m.adapter)
    KN, TN, cast = m.K * m.N, m.T * m.N, m.e + m.f if m.f != m.e else 0
    weight = [
        elementwise("identity", m, m.f * m.K * m.K),
        shrink(one),
        expand(one),
        elementwise("cast W", m, cast * KN),
        elementwise("scale B A", m, 2 * m.f * KN),
        elementwise("W + s B A", m, 3 * m.f * KN),
        elementwise("norms", m, m.f * KN),
    ]
    output = [
        elementwise("cast in", m, cast * m.T * m.K),
        shrink(m),
        expand(m),
        elementwise("(m - 1) y", m, (m.e + m.f) * TN),
        elementwise("m h", m, 2 * m.f * TN),
        elementwise("s h", m, 2 * m.f * TN),
        elementwise("their sum", m, 3 * m.f * TN),
        elementwise("add to y", m, (m.e + 2 * m.f) * TN),
        elementwise("cast back", m, cast * TN),
    ]
    return (base(m), *(one for one in (*weight, *output) if one.flops or one.passing))


def share(m: Module) -> Module:
    """What one adapter of a mixed batch serves: T / n tokens."""
    return Module(T=m.T / m.n, K=m.K, N=m.N, r=m.r, base=m.base, adapter=m.adapter)


TRAFFIC: Mapping[str, Callable[[Module], tuple[Kernel, ...]]] = {
    "merged": merged,
    "fused": fused,
    "two": two,
    "compiled": two,
    "eager": eager,
    "peft": peft,
    "looped": looped,
    "gathered": gathered,
    "merge": merge,
    "dora": dora,
}
"""What a Backend may name as its traffic."""
OWN = ("fused", "compiled")
"""Those whose base product may be another one than merged's: a kernel of their own, or what a compiler makes of it."""


def kernels(traffic: str, modules: Iterable[Module]) -> tuple[Kernel, ...]:
    """All kernels of one forward; raises InputError for a traffic that nobody counted."""
    if traffic not in TRAFFIC:
        raise InputError(f"nobody counted the traffic {traffic!r}", hint=f"known are {', '.join(TRAFFIC)}")
    return tuple(kernel for module in modules for kernel in TRAFFIC[traffic](module))

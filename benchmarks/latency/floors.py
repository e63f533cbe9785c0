"""With the ceilings of the device, the seconds that counted bytes and FLOPs must take, and those that they may take.

By the roofline a kernel lasts max(flops / P, bytes / W). Two kinds of seconds, never to be confused:

- The hard floor: what no implementation can beat. It decides `invalid`. Every weight and factor is read once, every
  multiplication done once, and all of that overlaps perfectly:
      cold   max(FLOPs / P, (e K N + f n r (K + N)) / W)          hot   FLOPs / P: the bytes may come from a cache
  Activations are left out: at 60 MB the L2 of a large GPU holds them, and what it holds no memory has to deliver. The
  factors cost 2 r min(T (K + N), n K N) FLOPs: an implementation may also form W + s B A and multiply by that. P and W
  are the best that was seen in the same run, W = max(read, copy): a matrix-vector product reads faster than a copy.
  Modules that are not adapted, attention, norms are not counted: the floor of a whole model is low, never high.
- The expected cost of an implementation: its own kernels one after the other, as a bracket. low: passing bytes cost
  nothing; high: all bytes go through memory at the rate of a copy. It explains a time and decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from benchmarks.latency.nouns import Ceilings
from benchmarks.latency.traffic import TRAFFIC, Kernel, Module, kernels, width
from lora_check.errors import InputError


def rate(dtype: str, ceilings: Ceilings) -> float:
    """P of a dtype, FLOP a second; raises InputError where the run did not measure it."""
    if dtype not in ceilings.matmul:
        known = ", ".join(ceilings.matmul) or "none"
        raise InputError(f"this run measured no rate of products in {dtype}", hint=f"it measured: {known}")
    return ceilings.matmul[dtype]


def bandwidth(ceilings: Ceilings) -> float:
    """W where a bound has to be safe: the larger of read and copy, bytes a second."""
    return max(ceilings.read, ceilings.copy)


def least(kernel: Kernel, ceilings: Ceilings, *, cold: bool) -> float:
    """Seconds of a kernel when all that passes stays in a cache; the weights too, when they are hot."""
    computing = kernel.flops / rate(kernel.dtype, ceilings) if kernel.flops else 0.0
    return max(computing, kernel.weights / bandwidth(ceilings) if cold else 0.0)


def most(kernel: Kernel, ceilings: Ceilings) -> float:
    """Seconds of a kernel when every byte goes through memory at the rate of a copy."""
    computing = kernel.flops / rate(kernel.dtype, ceilings) if kernel.flops else 0.0
    return max(computing, (kernel.weights + kernel.passing) / ceilings.copy)


def expected(parts: Sequence[Kernel], ceilings: Ceilings, *, cold: bool) -> tuple[float, float]:
    """(low, high) seconds of kernels one after the other, without their launches. It explains; it decides nothing."""
    return sum(least(one, ceilings, cold=cold) for one in parts), sum(most(one, ceilings) for one in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a forward cannot go without: FLOPs, and bytes of weights and factors."""

    flops: float
    weights: float


def needed(modules: Iterable[Module], *, adapted: bool) -> Work:
    """2 T K N FLOPs and e K N bytes of each module, and what `adapter_work` says where it is adapted.

    A merged forward with n adapters may do what an adapted one does, so that it needs the lesser of that and n e K N.
    """
    flops = weights = 0.0
    for m in modules:
        more = adapter_work(m)
        plain = m.e * m.K * m.N
        flops += 2 * m.T * m.K * m.N + (more.flops if adapted else 0)
        weights += plain + more.weights if adapted else min(m.n * plain, plain + (more.weights if m.n > 1 else 0))
    return Work(flops=flops, weights=weights)


def adapter_work(m: Module) -> Work:
    """What the adapters add at least: 2 r min(T (K + N), n K N) FLOPs, f n r (K + N) bytes."""
    way = min(m.T * (m.K + m.N), m.n * m.K * m.N)
    return Work(flops=2 * m.r * way, weights=m.f * m.n * m.r * (m.K + m.N))


def roofline(work: Work, dtypes: Iterable[str], ceilings: Ceilings, *, cold: bool) -> float:
    """max(FLOPs / P, bytes / W), the bytes of a cold cell only; P the best rate of the dtypes that may do the work."""
    computing = work.flops / max(rate(dtype, ceilings) for dtype in dtypes)
    return max(computing, work.weights / bandwidth(ceilings) if cold else 0.0)


def hard(modules: Sequence[Module], ceilings: Ceilings, *, cold: bool, adapted: bool) -> float:
    """Seconds that no implementation can beat: the first kind above."""
    return roofline(needed(modules, adapted=adapted), dtypes(modules), ceilings, cold=cold)


def beyond(modules: Sequence[Module], ceilings: Ceilings, *, cold: bool) -> float:
    """Seconds that kernels of their own beside the base product add at least: they cannot hide behind it.

    Over the measured seconds of merged, that is the least overhead of such an implementation; where merged runs at its
    floor it is r (1/K + 1/N).
    """
    works = [adapter_work(m) for m in modules]
    total = Work(flops=sum(one.flops for one in works), weights=sum(one.weights for one in works))
    return roofline(total, dtypes(modules), ceilings, cold=cold)


def dtypes(modules: Iterable[Module]) -> set[str]:
    """Every dtype that takes part."""
    return {dtype for m in modules for dtype in (m.base, m.adapter or m.base)}


def least_overhead(modules: Sequence[Module], ceilings: Ceilings) -> float:
    """fused / merged - 1, both at their roofline with every byte through memory: what a report plots as the floor."""
    plain, full = (sum(most(one, ceilings) for one in kernels(name, modules)) for name in ("merged", "fused"))
    return full / plain - 1 if plain else inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """Achieved over ceiling, of FLOPs and of bytes; None: the bytes of a hot cell say nothing of memory."""

    flops: float
    bytes: float | None

    @property
    def larger(self) -> float:
        """The one that binds."""
        return max(self.flops, self.bytes or 0.0)


def peak(modules: Sequence[Module], seconds: float, ceilings: Ceilings, *, cold: bool, adapted: bool) -> Peak:
    """Needed work by the second, over the ceilings. Work that a backend does beyond the need earns it nothing."""
    work = needed(modules, adapted=adapted)
    best = max(rate(dtype, ceilings) for dtype in dtypes(modules))
    return Peak(
        flops=work.flops / seconds / best,
        bytes=work.weights / seconds / bandwidth(ceilings) if cold else None,
    )


def launch_share(wall: float, busy: float) -> float:
    """(wall - busy) / wall: the part of an eager loop in which the device waits for its host."""
    return (wall - busy) / wall


def tokens_to_merge(K: int, N: int, traffic: str, dtype: str = "bfloat16", adapter: str = "") -> float:
    """T from which merging inside each forward moves fewer bytes than an implementation: for a small r

        2 e K N = T (bytes that it passes beyond the base product, by the token)

    which is T = 2 K N / (K + 2 N) for two and 2 K N / (K + 6 N) for eager.
    """
    others = TRAFFIC[traffic](Module(T=1, K=K, N=N, r=0, base=dtype, adapter=adapter))[1:]
    slope = sum(one.passing for one in others)
    return 2 * width(dtype) * K * N / slope if slope else inf

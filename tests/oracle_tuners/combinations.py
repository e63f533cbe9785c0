"""Say what PEFT's add_weighted_adapter makes of several LoRA adapters, in plain float64.

A kind is one of PEFT's combination_type.  All factors are those of one module: A (r, in, ...), B (out, r, ...); a
kernel is flattened, and of an embedding A is lora_embedding_A (r, vocab).  Releases differ; the caller names one.
What PEFT refuses, and what cannot be said, raises ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import oracle

Array = np.ndarray
Release = tuple[int, int]

NEWEST: Release = (0, 21)
ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
ON_DELTAS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


@dataclass(frozen=True)
class Part:
    """One adapter's share in a module: its factors, its own scale, and the weight it was given."""

    a: Array
    b: Array
    scale: float
    weight: float

    @property
    def delta(self) -> Array:
        """s B A, the kernel flattened."""
        return self.scale * (self.b.reshape(len(self.b), -1) @ self.a.reshape(len(self.a), -1))


@dataclass(frozen=True)
class Options:
    """What add_weighted_adapter is told besides, under its names.

    masks are the random choices of dare, 0 or 1: (of each A, of each B), or (of each delta, (out, in),) for an _svd
    kind.
    signs turn singular vectors: the clamp depends on them, and no SVD promises any.
    """

    rank: int = 0
    svd_clamp: float | None = None
    density: float | None = None
    majority_sign_method: str = "total"
    masks: tuple[Sequence[Array], ...] = ()
    signs: Array | None = None


# --- the new adapter ------------------------------------------------------------------------------------


def new_rank(kind: str, configs: Sequence[dict], svd_rank: int | None = None, release: Release = NEWEST) -> int:
    """The one rank there is, their sum for cat, svd_rank or the greatest for svd."""
    ranks = [_greatest_rank(config, release) for config in configs]
    if kind == "cat" and len(configs) > 1:
        return sum(ranks)
    if kind in ON_DELTAS and len(configs) > 1:
        return svd_rank or max(ranks)
    if len(set(ranks)) != 1:
        raise ValueError(f"{kind} of ranks {ranks}")
    return ranks[0]


def _greatest_rank(config: dict, release: Release) -> int:
    """r; since 0.16 the greatest of r and rank_pattern."""
    patterns = config.get("rank_pattern") or {}
    return max(config["r"], *patterns.values()) if patterns and release >= (0, 16) else config["r"]


def new_scale(first: dict, rank: int, path: str = "", release: Release = NEWEST) -> float:
    """alpha / r with alpha = r = rank: 1, but sqrt(rank) where the first adapter was rsLoRA.

    Up to 0.15 the new adapter keeps the first one's patterns, and with them another scale where one matches.
    """
    patterns = {} if release >= (0, 16) else {key: first.get(key) for key in ("rank_pattern", "alpha_pattern")}
    if release < (0, 15) and any(patterns.values()):
        raise ValueError("patterns were matched in another way before 0.15")
    kept = {"use_rslora": first.get("use_rslora"), **patterns}
    return oracle.rank_and_scale({**kept, "r": rank, "lora_alpha": rank}, path)[1]


def combine(
    kind: str, parts: Sequence[Part], options: Options | None = None, release: Release = NEWEST
) -> tuple[Array, Array]:
    """Give A and B of the new adapter, kernels flattened; its delta is new_scale times B A.

    Not of an embedding's svd before 0.9: PEFT took the transposed delta apart, and what came out does not merge.
    """
    options = options or Options()
    if len(parts) == 1:
        kind = "linear"
    if kind not in ("linear", "cat", "svd") and release < (0, 9):
        raise ValueError(f"{kind} came with 0.9")
    flat = [(part.a.reshape(len(part.a), -1), part.b.reshape(len(part.b), -1)) for part in parts]
    if kind == "cat":
        scaled = [part.weight * part.scale * a for part, (a, _) in zip(parts, flat, strict=True)]
        return _cat(scaled, [b for _, b in flat], options.rank)
    if kind in ON_DELTAS:
        return truncate(combined_delta(kind, parts, options, release), options)
    if kind not in ON_FACTORS:
        raise ValueError(f"combination_type {kind}")
    for_a, for_b = factor_weights(parts, release)
    masks = options.masks or ((), ())
    made_a = mix(kind, [a for a, _ in flat], for_a, options, masks[0], release)
    return made_a, mix(kind, [b for _, b in flat], for_b, options, masks[1], release)


def _cat(a: list[Array], b: list[Array], rank: int) -> tuple[Array, Array]:
    """Stack, then fill up with zeros to the new adapter's rank."""
    missing = max(0, rank - sum(map(len, a)))
    made_a, made_b = np.concatenate(a), np.concatenate(b, axis=1)
    return np.pad(made_a, ((0, missing), (0, 0))), np.pad(made_b, ((0, 0), (0, missing)))


def factor_weights(parts: Sequence[Part], release: Release = NEWEST) -> tuple[list[float], list[float]]:
    """What multiplies each A, and what each B.

    0.6: w s and 1.  0.7 and 0.8: sqrt(w) s and sqrt(w).  0.9 to 0.17: sqrt(w s) for both, so w s < 0 is refused.
    Since 0.18 sqrt |w s|, with its sign on both in 0.18, where it cancels, and on A alone since.
    """
    products = [part.weight * part.scale for part in parts]
    if release < (0, 7):
        return products, [1.0] * len(parts)
    rooted = [part.weight for part in parts] if release < (0, 9) else products
    if release < (0, 18) and min(rooted) < 0:
        raise ValueError("the root of a negative weight, which PEFT learned to take in 0.18")
    if release < (0, 9):
        return [math.sqrt(p.weight) * p.scale for p in parts], [math.sqrt(p.weight) for p in parts]
    roots = [math.sqrt(abs(w)) for w in products]
    signed = [math.copysign(root, w) for root, w in zip(roots, products, strict=True)]
    return signed, signed if release < (0, 19) else roots


def combined_delta(
    kind: str, parts: Sequence[Part], options: Options | None = None, release: Release = NEWEST
) -> Array:
    """What an _svd kind takes apart: the deltas, scaled already, pruned and summed with weights w_i.

    From 0.9 to 0.20 the weights were w_i s_i, so that every scale counted twice.
    """
    options = options or Options()
    twice = (0, 9) <= release < (0, 21)
    weights = [part.weight * (part.scale if twice else 1.0) for part in parts]
    masks = options.masks[0] if options.masks else ()
    return mix(kind.removesuffix("_svd"), [part.delta for part in parts], weights, options, masks, release)


# --- the mixtures of tensors ------------------------------------------------------------------------------


def mix(
    kind: str,
    tensors: Sequence[Array],
    weights: Sequence[float],
    options: Options,
    masks: Sequence[Array] = (),
    release: Release = NEWEST,
) -> Array:
    """sum w_i T_i of tensors pruned as kind says; for ties the mean of those with the elected sign.

    Ilharco et al. 2023 (svd, linear), Yadav et al. 2023 (ties), Yu et al. 2024 (dare).
    """
    if kind.startswith("dare"):
        tensors = [drop(t, mask, options.density, release) for t, mask in zip(tensors, masks, strict=True)]
    elif kind in ("ties", "magnitude_prune"):
        tensors = [keep_largest(t, options.density) for t in tensors]
    stack = np.stack(tensors)
    weighted = stack * np.array(weights).reshape(-1, *[1] * (stack.ndim - 1))
    if not kind.endswith("ties"):
        return weighted.sum(axis=0)
    agreeing = np.sign(stack) == elected_signs(stack, options.majority_sign_method)
    return (weighted * agreeing).sum(axis=0) / np.maximum(agreeing.sum(axis=0), 1)


def keep_largest(tensor: Array, density: float | None) -> Array:
    """Keep the floor(density size) entries of greatest magnitude; all of them from density 1 on."""
    if density is None or density < 0:
        raise ValueError(f"density {density}")
    if density >= 1:
        return tensor
    kept = int(density * tensor.size)
    order = np.sort(np.abs(tensor), axis=None)[::-1]
    if kept > 0 and order[kept] == order[kept - 1] != 0:
        raise ValueError("two entries of one magnitude at the cut: which of them stays is torch's choice")
    return np.where(np.abs(tensor) > (order[kept] if kept else np.inf), tensor, 0.0)


def drop(tensor: Array, mask: Array, density: float | None, release: Release = NEWEST) -> Array:
    """T m / density; up to 0.18 the division was computed and thrown away."""
    if density is None or density < 0 or not np.all((mask == 0) | (mask == 1)):
        raise ValueError(f"density {density}, or a mask that is not of 0 and 1")
    if density >= 1:
        return tensor
    if density == 0 and release >= (0, 19):
        raise ValueError("0 / 0 everywhere")
    return tensor * mask.reshape(tensor.shape) / (density if release >= (0, 19) else 1.0)


def elected_signs(stack: Array, method: str) -> Array:
    """The sign of the sum, or of the sum of signs; a tie counts as plus.  The weights have no vote."""
    if method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method {method}")
    votes = (stack if method == "total" else np.sign(stack)).sum(axis=0)
    return np.where(votes >= 0, 1.0, -1.0)


# --- back to factors --------------------------------------------------------------------------------------


def truncate(delta: Array, options: Options) -> tuple[Array, Array]:
    """A = V_r^T and B = U_r S_r, both clamped to the svd_clamp quantile of all their entries."""
    if not 0 < options.rank <= min(delta.shape):
        raise ValueError(f"svd_rank {options.rank} of {delta.shape}")
    left, values, right = np.linalg.svd(delta, full_matrices=False)
    a, b = right[: options.rank], left[:, : options.rank] * values[: options.rank]
    if options.signs is not None:
        a, b = a * options.signs[:, None], b * options.signs
    if options.svd_clamp is None:
        return a, b
    if options.signs is None:
        raise ValueError("the clamp depends on the signs of the singular vectors")
    limit = np.quantile(np.concatenate([b.reshape(-1), a.reshape(-1)]), options.svd_clamp)
    return np.clip(a, -limit, limit), np.clip(b, -limit, limit)


def conditioning(values: Array, rank: int) -> float:
    """How far the best approximation of that rank moves when the matrix moves by 1, in Frobenius norm.

    s_r / (s_r - s_r+1) of the singular values, to first order (Feppon and Lermusiaux 2018).
    """
    return 1.0 if rank >= len(values) else float(values[rank - 1] / (values[rank - 1] - values[rank]))

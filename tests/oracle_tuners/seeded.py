"""Say what a merge with each tuner must give whose state is partly drawn from a seed or taken from the base.

What a torch generator drew and no file holds (positions, the rows of a cluster) and what differs between builds
of LAPACK (the signs of singular vectors) is asked for in `Site.given`, never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np

from .additive import Array, Pair, Site

# --- shared random projections --------------------------------------------------------------------------


def vera(site: Site) -> Array:
    """(λb B) (λd A), the projections cut to this layer (VeRA, arXiv 2310.11454)."""
    return _scaled_projections(site, "vera", site.parts["vera_lambda_d"].size)


def pvera(site: Site) -> Array:
    """VeRA's product with the means: the first half of λd and of A; the second half holds log-variances."""
    return _scaled_projections(site, "pvera", site.parts["pvera_lambda_d"].size // 2)


def _scaled_projections(site: Site, prefix: str, rank: int) -> Array:
    """diag(λb) B[:out] diag(λd) A[:, :in], over the first rank of A."""
    rows, columns = site.weight.shape
    a = site.shared[f"base_model.{prefix}_A"][:rank, :columns]
    b = site.shared[f"base_model.{prefix}_B"][:rows]
    inner = np.diag(site.parts[f"{prefix}_lambda_d"][:rank])
    return np.diag(site.parts[f"{prefix}_lambda_b"]) @ b @ inner @ a


def randlora(site: Site) -> Array:
    """alpha / r times the sum over r n terms of B and λ A γ, along the shorter side (RandLoRA, arXiv 2502.00987).

    B (long, n, r) is counted n first, A (r, n, short) r first, so term c pairs B[:, c // r, c % r] with
    (λ A γ)[c // n, c % n].
    """
    strength, gamma = site.parts["randlora_lambda"], site.parts["randlora_gamma"]  # (r, n), (n, short)
    rank, count = strength.shape
    short, long = sorted(site.weight.shape)
    a, b = site.shared["base_model.randlora_A"], site.shared["base_model.randlora_B"]
    delta = np.zeros((long, short))
    for c in range(rank * count):
        i, j = c // count, c % count
        row = strength[i, j] * a[i, min(j, a.shape[1] - 1), :short] * gamma[j]
        delta += np.outer(b[:long, c // rank, c % rank], row)
    delta *= site.config["randlora_alpha"] / rank
    return delta if site.weight.shape[1] == short else delta.T


def unilora(site: Site) -> Array:
    """B A, each cell an entry of θ over the square root of how many cells share it."""
    theta = site.shared["base_model.unilora_theta_d"]
    if "unilora_indices_A" in site.parts:
        index = {side: site.parts[f"unilora_indices_{side}"].astype(np.int64) for side in "AB"}
        scale = {side: site.parts[f"unilora_scales_{side}"] for side in "AB"}
    else:
        index, counts = _drawn_indices(site)
        scale = {side: 1 / np.sqrt(counts[index[side]]) for side in "AB"}
    return (theta[index["B"]] * scale["B"]) @ (theta[index["A"]] * scale["A"])


def _drawn_indices(site: Site) -> tuple[dict[str, Array], Array]:
    """Deal the entries of θ out over the cells of A, then B, of every target in model order."""
    rank, length = site.config["r"], site.config["theta_d_length"]
    cells = sum(rank * (rows + columns) for rows, columns in site.targets.values())
    random = np.random.default_rng(site.config["proj_seed"])
    dealt = np.repeat(np.arange(length), cells // length)
    if cells % length:
        dealt = np.concatenate([dealt, random.choice(length, size=cells % length, replace=False)])
    random.shuffle(dealt)
    order = list(site.targets)
    start = sum(rank * sum(site.targets[name]) for name in order[: order.index(site.name)])
    rows, columns = site.targets[site.name]
    a = dealt[start : start + rank * columns].reshape(rank, columns)
    b = dealt[start + rank * columns : start + rank * (columns + rows)].reshape(rows, rank)
    return {"A": a, "B": b}, np.bincount(dealt, minlength=length)


# --- transforms at drawn positions ----------------------------------------------------------------------


def fourierft(site: Site) -> Array:
    """scaling / (m n) sum_l c_l cos 2π(j p_l / m + k q_l / n) at given positions p n + q (arXiv 2405.03003)."""
    (m, n), spectrum = site.weight.shape, site.parts["fourierft_spectrum"]
    delta = np.zeros((m, n))
    for value, position in zip(spectrum, site.given["positions"], strict=True):
        p, q = divmod(int(position), n)
        turns = np.add.outer(np.arange(m) * p / m, np.arange(n) * q / n)
        delta += value * np.cos(2 * np.pi * turns)
    return site.config["scaling"] / (m * n) * delta


def waveft(site: Site) -> Array:
    """scaling times the coefficients at given positions, or their inverse wavelet transform (arXiv 2505.12532)."""
    (m, n), family = site.weight.shape, site.config["wavelet_family"]
    dense = np.zeros(m * n)
    dense[np.asarray(site.given["positions"])] = site.parts["waveft_spectrum"]
    dense = dense.reshape(m, n)
    if not site.config["use_idwt"]:
        return site.config["scaling"] * dense
    low = np.asarray(site.given["low_pass"]) if "low_pass" in site.given else low_pass(family)
    return site.config["scaling"] * synthesis(dense, low, mirror(low))


def synthesis(dense: Array, low: Array, high: Array) -> Array:
    """Undo one level of a 2-d wavelet transform, from a coefficient matrix centred in a padded one.

    low, high: the filters of reconstruction, of even length L.  The pad is L - 2, and one more where that is odd.
    """
    (m, n), length = dense.shape, low.size
    rows, columns = ((size + length - 2 + 1) // 2 * 2 for size in dense.shape)
    padded = np.zeros((rows, columns))
    top, left = (rows - m) // 2, (columns - n) // 2
    padded[top : top + m, left : left + n] = dense
    tall, wide = rows // 2, columns // 2
    smooth_rows, sharp_rows = _upsampling(low, tall), _upsampling(high, tall)
    smooth_columns, sharp_columns = _upsampling(low, wide), _upsampling(high, wide)
    whole = smooth_rows @ padded[:tall, :wide] @ smooth_columns.T
    whole += sharp_rows @ padded[:tall, wide:] @ smooth_columns.T  # 'horizontal' detail is sharp from row to row
    whole += smooth_rows @ padded[tall:, :wide] @ sharp_columns.T
    whole += sharp_rows @ padded[tall:, wide:] @ sharp_columns.T
    top, left = (whole.shape[0] - m) // 2, (whole.shape[1] - n) // 2
    return whole[top : top + m, left : left + n]


def _upsampling(taps: Array, count: int) -> Array:
    """[i, k] = taps[i + L - 2 - 2 k]: insert zeros, filter, and drop the L - 2 samples at either end."""
    length = taps.size
    matrix = np.zeros((2 * count - length + 2, count))
    for i, k in np.ndindex(matrix.shape):
        tap = i + length - 2 - 2 * k
        matrix[i, k] = taps[tap] if 0 <= tap < length else 0.0
    return matrix


def low_pass(family: str) -> Array:
    """Derive the taps of Daubechies' wavelet of N vanishing moments: |H|² is known, its roots inside the circle kept.

    I. Daubechies, Ten Lectures on Wavelets, section 6.1.
    """
    number = re.fullmatch(r"db(\d+)", family)
    if number is None or not 1 <= int(number[1]) <= 10:
        raise ValueError(f"the taps of {family} must be given")
    moments = int(number[1])
    taps = np.poly([-1.0] * moments)
    half = [math.comb(moments - 1 + k, k) for k in range(moments)]
    for y in np.roots(half[::-1]):
        # y = (2 - z - 1/z) / 4
        pair = np.roots([1.0, 4 * y - 2, 1.0])
        taps = np.convolve(taps, [1.0, -pair[np.argmin(np.abs(pair))]])
    taps = np.real(taps)
    return taps * math.sqrt(2) / taps.sum()


def mirror(low: Array) -> Array:
    """Give the high-pass of reconstruction, (-1)ⁱ low[L - 1 - i]."""
    return np.array([(-1) ** i for i in range(low.size)]) * low[::-1]


# --- decompositions of the base -------------------------------------------------------------------------


def psoft(site: Site) -> Array:
    """s B (R - I) A from the r leading singular triples of W; R a scaled Cayley transform (PSOFT).

    A singular pair may be turned round, and the product changes with it: `given['signs']` says how the producer's
    SVD stood to NumPy's.
    """
    if site.config["psoft_svd"] != "full":
        raise ValueError("a randomised decomposition cannot be foretold")
    rank = site.config["r"]
    scale = site.config["psoft_alpha"] / rank
    left, values, right = np.linalg.svd(site.weight, full_matrices=False)
    signs = np.asarray(site.given.get("signs", np.ones(rank)))
    left, values, right = left[:, :rank] * signs, values[:rank] / scale, right[:rank] * signs[:, None]
    share = 1.0 if site.config["ab_svd_init"] == "psoft_init" else 0.5
    b, a = left * values**share, values[:, None] ** (1 - share) * right
    return scale * (b @ (psoft_rotation(site) - np.eye(rank)) @ a)


def psoft_rotation(site: Site) -> Array:
    """diag(b) (I + Q) (I - Q)⁻¹ diag(a), Q skew from its strict upper part, or what stands in for it."""
    rank, stored = site.config["r"], site.parts["psoft_R.weight"]
    turn = stored
    if site.config["psoft_orth"]:
        q = np.zeros((rank, rank))
        q[np.triu_indices(rank, 1)] = stored
        q = q - q.T
        neumann = site.config["use_cayley_neumann"]
        turn = _neumann(q, site) if neumann else (np.eye(rank) + q) @ np.linalg.inv(np.eye(rank) - q)
    after = site.parts.get("psoft_R.vector_b", np.ones(rank))
    before = site.parts.get("psoft_R.vector_a", np.ones(rank))
    return after[:, None] * turn * before


def _neumann(q: Array, site: Site) -> Array:
    """I + 2 Q + ... + 2 Qᵗ⁻² + Qᵗ⁻¹ of t terms; PEFT sums three terms as if they were four."""
    longest, terms = site.config["cayley_neumann_eps"], int(site.config["num_cayley_neumann_terms"])
    length = np.linalg.norm(q)
    if longest is not None and length > longest:
        q = q * (longest / (length + 1e-12))
    if terms <= 2:
        return np.eye(len(q)) + (2 * q if terms == 2 else 0)
    terms = max(terms, 4)
    powers = [np.linalg.matrix_power(q, i) for i in range(terms)]
    return powers[0] + 2 * sum(powers[1:-1]) + powers[-1]


def osf(site: Site) -> Array:
    """U S V of the file minus the same of the base beyond its leading triples (arXiv 2504.07097)."""
    leading = osf_rank(site)
    left, values, right = np.linalg.svd(site.weight, full_matrices=False)
    before = (left[:, leading:] * values[leading:]) @ right[leading:]
    u, s, v = (site.parts[f"osf_svd_params.{name}_low"] for name in "USV")
    return (u * s) @ v - before


def osf_rank(site: Site) -> int:
    """Resolve how many triples are kept: a count, a share of the shorter side, or half of it."""
    rank = site.config["effective_rank"]
    for pattern, special in (site.config.get("rank_pattern") or {}).items():
        if re.search(pattern, site.name):
            rank = special
            break
    shorter = min(site.weight.shape)
    if rank is None:
        return shorter // 2
    return min(shorter, int(shorter * rank) if isinstance(rank, float) and 0 < rank <= 1 else int(rank))


def frod(site: Site) -> Array:
    """U (S + diag(l)) Vᵀ - W, where the columns of U are those of W V⁻ᵀ at length one (FRoD)."""
    category = frod_category(site.name)
    v = site.shared[f"base_model.frod_V.{category}"]
    spread = np.diag(site.parts["frod_lambda_l"]).copy()
    rows, columns = site.shared[f"base_model.frod_s_indices.{category}"].astype(np.int64)
    np.add.at(spread, (rows, columns), site.parts["frod_lambda_s_values"])
    return frod_directions(site.weight, v) @ spread @ v.T - site.weight


def frod_directions(weight: Array, v: Array) -> Array:
    """Solve U diag Vᵀ = W; a column of no length stays zero."""
    solved = np.linalg.solve(v, weight.T).T
    lengths = np.linalg.norm(solved, axis=0)
    return np.where(lengths > 1e-12, solved / np.where(lengths > 1e-12, lengths, 1), 0)


def frod_category(name: str) -> str:
    """Name the group of layers that share V: the last two segments of the path, a number standing for none."""
    segments = name.split(".")
    if len(segments) == 1 or segments[-2].isdigit():
        return segments[-1]
    if segments[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{segments[-2]}_{segments[-1]}"


def adamss(site: Site) -> Pair:
    """W and b + B_i A_i N at the rows given for each subspace i; the last column of N is the bias's."""
    wide = np.zeros((site.weight.shape[0], site.parts["adamss_newB"].shape[1]))
    for i, rows in enumerate(site.given["rows"]):
        wide[np.asarray(rows)] = site.parts[f"adamss_B.{i}"] @ site.parts[f"adamss_A.{i}"] @ site.parts["adamss_newB"]
    if site.bias is None:
        return site.weight + wide, None
    return site.weight + wide[:, :-1], site.bias + wide[:, -1]


DELTAS: dict[str, Callable[[Site], Array]] = {
    "VERA": vera,
    "PVERA": pvera,
    "RANDLORA": randlora,
    "UNILORA": unilora,
    "FOURIERFT": fourierft,
    "WAVEFT": waveft,
    "PSOFT": psoft,
    "OSF": osf,
    "FROD": frod,
}
PAIRS: dict[str, Callable[[Site], Pair]] = {"ADAMSS": adamss}

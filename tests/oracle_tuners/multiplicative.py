"""Say what the tuners that rotate, scale or replace a weight make of it, in plain float64.

Every function takes the tensors of one module under the suffixes they have on disk, adapter_config.json, and the
module's weight and bias, and gives the merged weight and bias.  Where releases of PEFT differ and the file does not
tell, the caller names the release.  What cannot be said raises ValueError.
"""

from __future__ import annotations

import math
import re

import numpy as np
import oracle

Array = np.ndarray
Tensors = dict[str, Array]  # suffix on disk -> tensor
Merged = tuple[Array, Array | None]  # weight, bias
Release = tuple[int, int]

NEWEST: Release = (0, 21)


# --- IA3 ------------------------------------------------------------------------------------------------


def ia3(
    tensors: Tensors, config: dict, weight: Array, bias: Array | None, *, path: str, kind: str = "linear"
) -> Merged:
    """Scale outputs by l, W' = diag(l) W and b' = l b; or inputs of a feed-forward module, W' = W diag(l).

    kind is the oracle's: linear (out, in), conv1d_t (in, out), conv (out, in, k...).  Liu et al. 2022, section 3.3.
    """
    scales = tensors["ia3_l"]
    outputs = oracle.OUTPUT_AXIS[kind]
    inputs = 1 - outputs
    if not is_feedforward(config, path):
        _demand(scales, (1 if kind == "conv" else 0), weight.shape[outputs])
        return weight * _along(scales, outputs, weight.ndim), None if bias is None else bias * scales.reshape(-1)
    if kind != "conv":
        _demand(scales, 1, weight.shape[inputs])
        return weight * _along(scales, inputs, weight.ndim), bias
    return _scale_conv_inputs(weight, scales.reshape(-1)), bias


def is_feedforward(config: dict, path: str) -> bool:
    """Look a module up in feedforward_modules: a regex of the whole path, or endings, dot or no dot."""
    wanted = config["feedforward_modules"]
    if wanted is None:
        raise ValueError("feedforward_modules is not written: it depends on the model type")
    return bool(re.fullmatch(wanted, path)) if isinstance(wanted, str) else any(path.endswith(end) for end in wanted)


def _demand(scales: Array, axis: int, length: int) -> None:
    """Refuse a vector that lies along another axis than its role says."""
    if scales.shape[axis] != length or scales.size != length:
        raise ValueError(f"ia3_l is {scales.shape}, not {length} along axis {axis}")


def _along(vector: Array, axis: int, ndim: int) -> Array:
    """Shape a vector to multiply one axis of a tensor."""
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _scale_conv_inputs(weight: Array, scales: Array) -> Array:
    """Scale the input channels each output sees; with groups an output sees only those of its own group."""
    seen = weight.shape[1]
    groups = scales.size // seen
    if groups * seen != scales.size or weight.shape[0] % groups:
        raise ValueError(f"{scales.size} scales for a kernel {weight.shape}")
    made = weight.copy()
    per_group = weight.shape[0] // groups
    for out in range(weight.shape[0]):
        first = (out // per_group) * seen
        made[out] = weight[out] * _along(scales[first : first + seen], 0, weight.ndim - 1)
    return made


# --- rotations ------------------------------------------------------------------------------------------


def skew_part(x: Array) -> Array:
    """(X - X^T) / 2 of each block."""
    return (x - np.swapaxes(x, -1, -2)) / 2


def unpack_skew(packed: Array) -> Array:
    """Fill skew matrices from rows that hold the strict upper triangle, row after row."""
    n = (1 + math.isqrt(1 + 8 * packed.shape[1])) // 2
    if n * (n - 1) // 2 != packed.shape[1]:
        raise ValueError(f"{packed.shape[1]} numbers fill no triangle")
    skew = np.zeros((len(packed), n, n))
    places = [(row, column) for row in range(n) for column in range(row + 1, n)]
    for number, (row, column) in enumerate(places):
        skew[:, row, column] = packed[:, number]
        skew[:, column, row] = -packed[:, number]
    return skew


def cayley(skew: Array) -> Array:
    """(I - Q) (I + Q)^-1 of each block: a rotation where Q is skew."""
    identity = np.eye(skew.shape[-1])
    return (identity - skew) @ np.linalg.inv(identity + skew)


def neumann(skew: Array, terms: int, release: Release = NEWEST) -> Array:
    """I + 2Q + 2Q^2 + ... of each block: the series of (I + Q) (I - Q)^-1, cut off.

    0.16 and 0.17 stop at 2 Q^(t-1) for t terms; since 0.18 the last power counts once, and three terms are
    computed as four, since that power is added after the loop in any case.
    """
    top, last = terms - 1, 2.0
    if release >= (0, 18) and terms > 2:
        top, last = max(terms, 4) - 1, 1.0
    series = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape).copy()
    power = series.copy()
    for exponent in range(1, top + 1):
        power = power @ skew
        series += (last if exponent == top else 2.0) * power
    return series


def project(blocks: Array, eps: float) -> Array:
    """Shrink each block to the Frobenius norm eps / sqrt(blocks) where it is longer: COFT's ball around I."""
    radius = eps / math.sqrt(len(blocks))
    norms = np.sqrt(np.sum(blocks * blocks, axis=(1, 2), keepdims=True))
    return np.where(norms <= radius, blocks, radius * blocks / np.where(norms == 0, 1.0, norms))


def block_diagonal(blocks: Array, size: int, *, shared: bool) -> Array:
    """Set blocks along the diagonal of a (size, size) matrix, one for all if shared; the last may be cut."""
    n = blocks.shape[-1]
    count = -(-size // n)
    if len(blocks) != (1 if shared else count):
        raise ValueError(f"{len(blocks)} blocks of {n} for {size}, shared is {shared}")
    whole = np.zeros((count * n, count * n))
    for i in range(count):
        whole[i * n : (i + 1) * n, i * n : (i + 1) * n] = blocks[0 if shared else i]
    return whole[:size, :size]


def rotate_inputs(rotation: Array, weight: Array) -> Array:
    """(R W^T)^T on the flattened kernel."""
    return (rotation @ weight.reshape(len(weight), -1).T).T.reshape(weight.shape)


def oft(tensors: Tensors, config: dict, weight: Array, bias: Array | None, *, release: Release = NEWEST) -> Merged:
    """W' = (R W^T)^T with block diagonal R; W R for an embedding.  The tensors' names tell the format.

    oft_R, oft_embedding_R (blocks, n(n-1)/2): 0.16 on.  oft_r (blocks, n, n) with oft_s (out, 1): 0.14 and 0.15.
    oft_r alone: 0.7 to 0.13.  release matters to the first only.  Qiu et al. 2023, with Cayley's form of a rotation.
    """
    if "oft_s" in tensors:
        return _oft_0_14(tensors, config, weight), bias
    if "oft_r" in tensors:
        return _oft_0_7(tensors, config, weight), bias
    is_embedding = "oft_embedding_R.weight" in tensors
    skew = unpack_skew(tensors["oft_embedding_R.weight" if is_embedding else "oft_R.weight"])
    if config["coft"]:
        skew = project(skew, config["eps"])
    exact = not config["use_cayley_neumann"]
    blocks = cayley(skew) if exact else neumann(skew, config["num_cayley_neumann_terms"], release)
    size = weight[0].size
    if size % blocks.shape[-1]:
        raise ValueError(f"blocks of {blocks.shape[-1]} do not divide {size}")
    rotation = block_diagonal(blocks, size, shared=config["block_share"])
    return (weight @ rotation if is_embedding else rotate_inputs(rotation, weight)), bias


def _oft_0_14(tensors: Tensors, config: dict, weight: Array) -> Array:
    """(R W^T)^T s, R from X - X^T; COFT holds X itself in a ball that grows with (out / blocks)^2."""
    x, size = tensors["oft_r"], weight[0].size
    if config["coft"]:
        x = project(x, config["eps"] * math.ceil(len(weight) * x.shape[-1] / size) ** 2)
    rotation = block_diagonal(cayley(skew_part(x)), size, shared=config["block_share"])
    return rotate_inputs(rotation, weight) * _along(tensors["oft_s"], 0, weight.ndim)


def _oft_0_7(tensors: Tensors, config: dict, weight: Array) -> Array:
    """(W^T R)^T: the outputs are rotated, by blocks of ceil(out / r) of which the last may be cut."""
    x = tensors["oft_r"]
    if config["coft"]:
        x = project(x, config["eps"] * x.shape[-1] ** 2)
    rotation = block_diagonal(cayley(skew_part(x)), len(weight), shared=config["block_share"])
    return (rotation.T @ weight.reshape(len(weight), -1)).reshape(weight.shape)


def boft(tensors: Tensors, config: dict, weight: Array, bias: Array | None, *, release: Release = NEWEST) -> Merged:
    """W' = s (R W^T)^T, R block diagonal, for butterfly factor 1, which is what a machine without CUDA makes.

    boft_R (1, blocks, n, n), boft_s (out, 1) or (1, out).  The bias stays.  Up to 0.13 the numbers of a kernel were
    read as (in k k, out) without being moved.  Liu et al. 2024.
    """
    factors, scales = tensors["boft_R"], tensors["boft_s"]
    if len(factors) != 1:
        raise ValueError(f"butterfly factor {len(factors)}: its permutations are not said here")
    rotation = block_diagonal(cayley(skew_part(factors[0])), weight[0].size, shared=False)
    if weight.ndim > 2 and release < (0, 14):
        return (rotation @ weight.reshape(-1, len(weight)) * scales.reshape(1, -1)).reshape(weight.shape), bias
    return rotate_inputs(rotation, weight) * _along(scales, 0, weight.ndim), bias


def hra(tensors: Tensors, config: dict, weight: Array, bias: Array | None) -> Merged:
    """W' = W H_1 H_2 ... H_r, H_i = I - 2 u_i u_i^T of unit u_i; with apply_GS the u_i are made orthogonal first.

    hra_u (in, r), the kernel flattened.  Yuan et al. 2024.
    """
    made = weight.reshape(len(weight), -1)
    for u in unit_columns(tensors["hra_u"], orthogonal=config["apply_GS"]).T:
        made = made - 2 * np.outer(made @ u, u)
    return made.reshape(weight.shape), bias


def unit_columns(columns: Array, *, orthogonal: bool) -> Array:
    """Give the columns the length one, each freed of those before it if orthogonal."""
    made: list[Array] = []
    for column in columns.T:
        for before in made if orthogonal else []:
            column = column - (before @ column) * before
        made.append(column / np.sqrt(column @ column))
    return np.stack(made, axis=1)


def road(tensors: Tensors, config: dict, weight: Array, bias: Array | None) -> Merged:
    """W' = R W and b' = R b, R turning and stretching pairs of outputs that lie half a group apart.

    y1 = c1 x1 - s1 x2 and y2 = c2 x2 + s2 x1, c = alpha cos(theta), s = alpha sin(theta); road_1 has one angle a
    pair, road_2 one an output, road_4 one for the cosine and one for the sine of each.  Liao and Monz 2024, equation 4.
    """
    group = config["group_size"]
    cosines, sines = road_factors(tensors["road_theta"], tensors["road_alpha"], config["variant"], group)
    if cosines.size != len(weight):
        raise ValueError(f"{cosines.size} factors for {len(weight)} outputs")
    made = _turn(weight, cosines, sines, group)
    return made, None if bias is None else _turn(bias[:, None], cosines, sines, group)[:, 0]


def road_factors(theta: Array, alpha: Array, variant: str, group: int) -> tuple[Array, Array]:
    """alpha cos(theta) and alpha sin(theta) of every output."""
    half = group // 2
    if variant == "road_1":  # what the first half of a group has, the second has too
        theta, alpha = (np.concatenate([v.reshape(-1, half)] * 2, axis=1).reshape(-1) for v in (theta, alpha))
    if variant in ("road_1", "road_2"):
        return alpha * np.cos(theta), alpha * np.sin(theta)
    if variant != "road_4":
        raise ValueError(f"variant {variant}")
    theta, alpha = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
    cosines, sines = alpha[:, 0] * np.cos(theta[:, 0]), alpha[:, 1] * np.sin(theta[:, 1])
    return cosines.reshape(-1), sines.reshape(-1)


def _turn(rows: Array, cosines: Array, sines: Array, group: int) -> Array:
    """Mix each row with its partner half a group away."""
    made = np.empty_like(rows)
    half = group // 2
    for row in range(len(rows)):
        is_first = row % group < half
        partner, sign = (row + half, -1.0) if is_first else (row - half, 1.0)
        made[row] = cosines[row] * rows[row] + sign * sines[row] * rows[partner]
    return made


# --- MiSS and Bone --------------------------------------------------------------------------------------


def miss(tensors: Tensors, config: dict, weight: Array, bias: Array | None) -> Merged:
    """W'[o, i] = W[o, i] + D[i mod r, o]; mini repeats a D of mini_r columns; bat: W' = W + W D_o + D_o by r x r tiles.

    miss_block (r, out), mini (r, mini_r), bat (out / r, r, r); init_weights tells which.  Kang and Yin 2024.
    """
    return _shard_shared(tensors["miss_block"], config, weight), bias


def bone(tensors: Tensors, config: dict, weight: Array, bias: Array | None) -> Merged:
    """MiSS under its old name, 0.14 to 0.18: plain and bat, bone_block for miss_block."""
    if config["init_weights"] == "mini":
        raise ValueError("Bone has no mini variant")
    return _shard_shared(tensors["bone_block"], config, weight), bias


def _shard_shared(block: Array, config: dict, weight: Array) -> Array:
    """Add the block as init_weights says."""
    outputs, inputs = weight.shape
    if config["init_weights"] == "bat":
        return _bat(block, weight)
    if config["init_weights"] == "mini":
        if block.shape[1] != config["mini_r"] or outputs % config["mini_r"]:
            raise ValueError(f"mini_r is {config['mini_r']}, the block {block.shape}, the weight {weight.shape}")
        block = np.tile(block, (1, outputs // config["mini_r"]))
    return weight + block[np.arange(inputs) % len(block)].T


def _bat(blocks: Array, weight: Array) -> Array:
    """Go over the tiles: those of one row of tiles share a block."""
    r = blocks.shape[-1]
    if weight.shape[0] != r * len(blocks) or weight.shape[1] % r:
        raise ValueError(f"{len(blocks)} blocks of {r} for {weight.shape}")
    made = weight.copy()
    for row, block in enumerate(blocks):
        for column in range(weight.shape[1] // r):
            tile = (slice(row * r, (row + 1) * r), slice(column * r, (column + 1) * r))
            made[tile] += weight[tile] @ block + block
    return made


# --- replacements ---------------------------------------------------------------------------------------


def ln_tuning(tensors: Tensors, config: dict, weight: Array, bias: Array | None) -> Merged:
    """The trained copy of the module takes its place."""
    return tensors["ln_tuning_layers.weight"], None if bias is None else tensors["ln_tuning_layers.bias"]


def trainable_tokens(tensors: Tensors, config: dict, weight: Array, bias: Array | None, *, path: str = "") -> Merged:
    """W'[token_indices] = rows, whatever the name 'delta' says.

    trainable_tokens_delta of the tuner, token_adapter.trainable_tokens_delta of a LoRA configuration.
    """
    (rows,) = tensors.values()
    made = weight.copy()
    made[oracle.token_indices(config, path)] = rows
    return made, bias


# --- LoRA whose base or norm is not the base in the file ------------------------------------------------


def _low_rank(tensors: Tensors, config: dict, path: str, kind: str) -> tuple[Array, Array | None]:
    """s B A in the layout of the weight, and DoRA's magnitude where there is one."""
    roles = {oracle.parse_key(f"base_model.model.module.{suffix}")[1]: t for suffix, t in tensors.items()}
    rank, scale = oracle.rank_and_scale(config, path)
    if set(roles) - {"A", "B", "m"} or len(roles["A"]) != rank:
        raise ValueError(f"r={rank}, tensors {[(suffix, t.shape) for suffix, t in tensors.items()]}")
    return oracle.DELTAS[kind](roles["A"], roles["B"], scale), roles.get("m")


def dora_in_turn(
    adapters: list[tuple[Tensors, dict]],
    weight: Array,
    *,
    path: str = "",
    kind: str = "linear",
    release: Release = NEWEST,
) -> Array:
    """W <- m (W + D) / |V + D| for one adapter after the other, W <- W + D for one without a magnitude.

    V is the original weight since 0.21, and W itself, with what is merged already, in 0.12 to 0.20; before, a
    second DoRA adapter is refused.  Up to 0.15 an embedding is merged as if it had no magnitude, though its forward
    uses it.  Liu et al. 2024, equation 5, which knows one adapter.
    """
    deltas = [_low_rank(tensors, config, path, kind) for tensors, config in adapters]
    if release < (0, 12) and sum(magnitude is not None for _, magnitude in deltas) > 1:
        raise ValueError("PEFT refuses a second DoRA adapter before 0.12")
    made = weight
    for delta, magnitude in deltas:
        moved = made + delta
        if magnitude is not None and (kind != "embedding" or release >= (0, 16)):
            norm = oracle.lengths((weight if release >= (0, 21) else made) + delta, kind)
            moved = moved * magnitude.reshape(norm.shape) / norm
        made = moved
    return made


def residual_base(weight: Array, config: dict, *, path: str = "", kind: str = "linear") -> Array:
    """What PEFT makes of the base when it loads an unconverted PiSSA or OLoRA adapter.

    pissa: W - U_r S_r V_r^T, the r greatest singular values (Meng et al. 2024).  olora: W - s Q_r R_r of
    W = Q R, that is s times the projection on the first r columns of W (Büyükakyüz 2024).
    """
    rank, scale = oracle.rank_and_scale(config, path)
    how = config["init_lora_weights"]
    if kind not in ("linear", "conv1d_t") or rank > min(weight.shape):
        raise ValueError(f"r={rank} of a {kind} {weight.shape}")
    if how == "pissa":
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        return weight - (left[:, :rank] * values[:rank]) @ right[:rank]
    if str(how).lower() == "olora" and kind == "linear":
        q, _ = np.linalg.qr(weight[:, :rank])
        return weight - scale * (q @ (q.T @ weight))
    raise ValueError(f"no residual base for {how} of a {kind}")


def residual_lora(
    tensors: Tensors, config: dict, weight: Array, bias: Array | None, *, path: str = "", kind: str = "linear"
) -> Merged:
    """W_res + s B A, the base taken apart as above and the trained factors added."""
    delta, magnitude = _low_rank(tensors, config, path, kind)
    if magnitude is not None:
        raise ValueError("a magnitude on a base that was taken apart is not said here")
    return residual_base(weight, config, path=path, kind=kind) + delta, bias

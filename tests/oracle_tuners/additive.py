"""Say what a merge with each tuner must give whose whole state is in the adapter file, in plain float64.

Written from the papers and from PEFT's documented formulas, one small function a tuner.  Each takes a `Site`, in
which a matrix is always (out, in); the caller turns what a file lays out (in, out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import oracle

Array = np.ndarray


@dataclass(frozen=True)
class Site:
    """Hold one adapted module and all that its tuner may ask for."""

    name: str  # module path in the model
    parts: Mapping[str, Array]  # suffix on disk -> tensor of this module
    shared: Mapping[str, Array]  # whole name on disk, 'base_model.<tuner>_...' -> tensor of all modules
    config: Mapping  # adapter_config.json
    weight: Array  # (out, in), (out, in, k...) or (vocab, dim)
    bias: Array | None = None
    targets: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # every target in model order -> (out, in)
    given: Mapping[str, object] = field(default_factory=dict)  # what no file holds: positions, rows, signs


Pair = tuple[Array, Array | None]  # W', b'


# --- LoRA and its variants ------------------------------------------------------------------------------


def lora(site: Site) -> Pair:
    """W + s B A and b + s B.bias: LoRA, also MiCA, MonteCLoRA and VeLoRA, whose extra state is not merged."""
    refused = [name for name in ("use_dora", "use_qalora", "alora_invocation_tokens") if site.config.get(name)]
    if refused or site.config.get("init_lora_weights") not in (True, False, "gaussian", "orthogonal", "eva", "mica"):
        raise ValueError(f"not told here: {refused or site.config.get('init_lora_weights')}")
    if site.config.get("kasa_config"):
        return kasa(site), site.bias
    scale = oracle.rank_and_scale(dict(site.config), site.name)[1]
    bias = site.bias if "lora_B.bias" not in site.parts else site.bias + scale * site.parts["lora_B.bias"]
    if "lora_embedding_A" in site.parts:
        a, b = site.parts["lora_embedding_A"], site.parts["lora_embedding_B"]
        return site.weight + oracle.delta_embedding(a, b, scale), bias
    a, b = site.parts["lora_A.weight"], site.parts["lora_B.weight"]
    if site.config.get("use_bdlora"):
        a, b = _unpacked(site, a, b)
    return site.weight + (oracle.delta_conv if a.ndim > 2 else oracle.delta_linear)(a, b, scale), bias


def _unpacked(site: Site, a: Array, b: Array) -> tuple[Array, Array]:
    """Put the blocks of BD-LoRA's packed factor on the diagonal; a pattern anywhere in the path says which."""
    settings = site.config["use_bdlora"]
    if any(pattern in site.name for pattern in settings["target_modules_bd_a"] or []):
        return block_diagonal(a, settings["nblocks"]), b
    if any(pattern in site.name for pattern in settings["target_modules_bd_b"] or []):
        return a, block_diagonal(b, settings["nblocks"])
    return a, b


def block_diagonal(packed: Array, blocks: int) -> Array:
    """Spread (rows, columns / blocks) to (rows, columns), one run of rows after the other."""
    rows, width = packed.shape[0] // blocks, packed.shape[1]
    spread = np.zeros((packed.shape[0], width * blocks))
    for i in range(blocks):
        spread[i * rows : (i + 1) * rows, i * width : (i + 1) * width] = packed[i * rows : (i + 1) * rows]
    return spread


def kasa(site: Site) -> Array:
    """W without its r smallest singular components, + s B diag(d) A (arXiv 2412.06071)."""
    rank, scale = oracle.rank_and_scale(dict(site.config), site.name)
    left, values, right = np.linalg.svd(site.weight, full_matrices=False)
    kept = values.size - rank
    principal = sum(values[i] * np.outer(left[:, i], right[i]) for i in range(kept))
    a, b, diagonal = (site.parts[name] for name in ("lora_A.weight", "lora_B.weight", "lora_diag"))
    return principal + scale * (b @ np.diag(diagonal) @ a)


def merged_parameters(
    parts: Mapping[str, Array], config: Mapping, module: str, parameters: Mapping[str, Array], *, in_out: bool = False
) -> dict[str, Array]:
    """Merge LoRA on raw parameters (E, out, in), or (E, in, out), of one module.

    parameters: the targeted ones in the order in which the module registers them.  The first is wrapped
    innermost, so its keys carry one 'base_layer.' for each of the others.
    """
    made: dict[str, Array] = {}
    for number, (name, weight) in enumerate(parameters.items()):
        prefix = "base_layer." * (len(parameters) - 1 - number)
        a, b = parts[f"{prefix}lora_A.weight"], parts[f"{prefix}lora_B.weight"]
        scale = oracle.rank_and_scale(dict(config), f"{module}.{name}")[1]
        made[name] = weight + scale * _expert_deltas(a, b, weight, in_out)
    return made


def _expert_deltas(a: Array, b: Array, weight: Array, in_out: bool) -> Array:
    """B_e A_e of every expert: row e r + i of A is row i of A_e, column i E + e of B is column i of B_e."""
    if weight.ndim == 2:
        return b @ a
    experts = weight.shape[0]
    rank = a.shape[0] // experts
    deltas = [b[:, e::experts] @ a[e * rank : (e + 1) * rank] for e in range(experts)]
    return np.stack([delta.T if in_out else delta for delta in deltas])


# --- other low ranks ------------------------------------------------------------------------------------


def adalora(site: Site) -> Array:
    """k / (init_r + 1e-5) B (A E), k = lora_alpha where positive, else the rank; pruning does not lower init_r."""
    a, b, e = (site.parts[name] for name in ("lora_A", "lora_B", "lora_E"))
    alpha = site.config["lora_alpha"]
    scale = (alpha if alpha > 0 else a.shape[0]) / (site.config["init_r"] + 1e-5)
    return scale * (b @ (a * e)).reshape(site.weight.shape)


def _alpha_over_rank(site: Site) -> float:
    """Give alpha / r of LoHa and LoKr after patterns."""
    rank = oracle.pattern_value(site.config.get("rank_pattern"), site.name, site.config["r"])
    return oracle.pattern_value(site.config.get("alpha_pattern"), site.name, site.config["alpha"]) / rank


def _tucker(core: Array, a: Array, b: Array) -> Array:
    """[p, q, k, l] = sum_ij core[i, j, k, l] a[i, p] b[j, q]."""
    return np.einsum("ijkl,ip,jq->pqkl", core, a, b)


def loha(site: Site) -> Array:
    """alpha / r (W1a W1b) ⊙ (W2a W2b); with cores, each half is a Tucker product (FedPara, arXiv 2108.06098)."""
    halves = []
    for half in ("1", "2"):
        a, b = site.parts[f"hada_w{half}_a"], site.parts[f"hada_w{half}_b"]
        core = site.parts.get(f"hada_t{half}")
        halves.append(a @ b if core is None else _tucker(core, a, b))
    return _alpha_over_rank(site) * (halves[0] * halves[1]).reshape(site.weight.shape)


def lokr(site: Site) -> Array:
    """alpha / r W1 ⊗ W2, each whole or factored, W2 also with a core."""
    parts = site.parts
    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        second = parts["lokr_w2"]
    elif "lokr_t2" in parts:
        second = _tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        second = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    if second.ndim == 4:
        first = first[:, :, None, None]
    elif second.ndim == 3:
        first = first[None]  # PEFT gives W1 unit axes only for four, so a 1-d kernel meets W1's inputs
    return _alpha_over_rank(site) * np.kron(first, second).reshape(site.weight.shape)


def vblora(site: Site) -> Array:
    """B A, each sub-vector a softmax-weighted sum of its top k of the bank (VB-LoRA, arXiv 2405.15179)."""
    a, b = _from_bank(site, "vblora_logits_A"), _from_bank(site, "vblora_logits_B")
    a = a.reshape(a.shape[0], -1)  # (r, in / v, v)
    b = b.transpose(0, 2, 1).reshape(-1, b.shape[1])  # (out / v, r, v)
    return b @ a


def _from_bank(site: Site, name: str) -> Array:
    """Mix the bank's vectors, from logits or from saved top-k weights, of which the last is left out."""
    bank = site.shared["base_model.vblora_vector_bank"]
    if name in site.parts:
        chosen = np.argsort(-site.parts[name], axis=-1)[..., : site.config["topk"]]
        exponentials = np.exp(np.take_along_axis(site.parts[name], chosen, axis=-1))
        weights = exponentials / exponentials.sum(-1, keepdims=True)
    else:
        chosen, weights = site.parts[f"{name}_topk_indices"].astype(np.int64), site.parts[f"{name}_topk_weights"]
        weights = np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], axis=-1)
    return np.sum(weights[..., None] * bank[chosen], axis=-2)


def delora(site: Site) -> Array:
    """B diag(λ / (r |A_i| |B_i|)) A, each input times the norm of its column of W as saved (arXiv 2503.18225)."""
    a, b, strength = site.parts["delora_A"], site.parts["delora_B"], float(site.parts["delora_lambda"][0])
    delta = np.zeros((b.shape[0], a.shape[1]))
    for i in range(a.shape[0]):
        lengths = max(np.linalg.norm(a[i]), 1e-4) * max(np.linalg.norm(b[:, i]), 1e-4)
        delta += strength / a.shape[0] / lengths * np.outer(b[:, i], a[i])
    return delta * site.parts["delora_w_norm"]


def gralora(site: Site) -> Array:
    """alpha / (r + hybrid r): block (j, n) of k x k is B_j[slice n]ᵀ A_n[slice j]ᵀ (GraLoRA, arXiv 2505.20355)."""
    a, b = site.parts["gralora_A"], site.parts["gralora_B"]  # (k, in / k, r), (k, r, out / k)
    blocks, width, rank = a.shape
    height, piece = b.shape[2], rank // blocks
    delta = np.zeros((blocks * height, blocks * width))
    for j in range(blocks):
        for n in range(blocks):
            left, right = b[j, n * piece : (n + 1) * piece], a[n][:, j * piece : (j + 1) * piece]
            delta[j * height : (j + 1) * height, n * width : (n + 1) * width] = left.T @ right.T
    if site.config["hybrid_r"]:
        delta = delta + site.parts["gralora_B_general.weight"] @ site.parts["gralora_A_general.weight"]
    return site.config["alpha"] / (rank + site.config["hybrid_r"]) * delta


def tinylora(site: Site) -> Array:
    """B (sum_u v_u P_u) A, v shared by runs of layers in model order."""
    order = list(site.targets)
    groups = max(1, round(len(order) * (1 - site.config["weight_tying"])))
    group = min(order.index(site.name) // max(1, len(order) // groups), groups - 1)
    v, projections = site.shared[f"base_model.tinylora_v.{group}"], site.parts["tinylora_P"]
    middle = sum(v[u] * projections[u] for u in range(v.size))
    return site.parts["tinylora_B"] @ middle @ site.parts["tinylora_A"]


# --- not of low rank ------------------------------------------------------------------------------------


def shira(site: Site) -> Array:
    """Values at the saved rows and columns, zero elsewhere."""
    delta = np.zeros(site.weight.shape)
    rows, columns = site.parts["shira_indices"].astype(np.int64)
    np.add.at(delta, (rows, columns), site.parts["shira_weight"])
    return delta


def supertuning(site: Site) -> Array:
    """Values at flat positions, else at the entries largest or smallest in size; Supra adds alpha / r B A."""
    values = site.parts["supertuning_values"]
    positions = site.parts.get("supertuning_indices")
    if positions is None:
        sizes = np.abs(site.weight).ravel()
        positions = np.argsort(-sizes if site.config["select_top"] else sizes)[: values.size]
    delta = np.zeros(site.weight.size)
    np.add.at(delta, positions.astype(np.int64), values)
    delta = delta.reshape(site.weight.shape)
    if site.config["r"] is None:
        return delta
    low = site.parts["supertuning_lora_B.weight"] @ site.parts["supertuning_lora_A.weight"]
    return delta + site.config["lora_alpha"] / site.config["r"] * low


def c3a(site: Site) -> Array:
    """[m b + p, n b + q] = w[m, n, (q - p) mod b] / in: circulant blocks (C3A, arXiv 2407.19342)."""
    kernel = site.parts["c3a_kernel"]
    block = kernel.shape[2]
    delta = np.zeros(site.weight.shape)
    for o, i in np.ndindex(delta.shape):
        delta[o, i] = kernel[o // block, i // block, (i % block - o % block) % block]
    return delta / site.weight.shape[1]


# --- what depends on W ----------------------------------------------------------------------------------


def hira(site: Site) -> Array:
    """W ⊙ B A (HiRA, ICLR 2025): no scale."""
    if "hira_embedding_A" in site.parts:
        low = oracle.delta_embedding(site.parts["hira_embedding_A"], site.parts["hira_embedding_B"], 1)
    else:
        a, b = site.parts["hira_A"], site.parts["hira_B"]
        low = (oracle.delta_conv if a.ndim > 2 else oracle.delta_linear)(a, b, 1)
    return site.weight * low


def deft(site: Site) -> Array:
    """Q (k R - Mᵀ W), Q = P and M = relu(P), or both the Q of P = QR; without R for PaRa.

    The signs of Q's columns matter beside R.  They are those of Householder's method: each column of P that is
    reduced leaves an entry of the other sign on the diagonal.
    """
    p = site.parts["deft_P"]
    q = np.linalg.qr(p)[0] if site.config["decomposition_method"] == "qr" else p
    m = q if site.config["decomposition_method"] == "qr" else np.maximum(p, 0)
    if site.config["para"]:
        return -q @ (m.T @ site.weight)
    scale = site.config["alpha"] / p.shape[1] if site.config["alpha"] else 1.0
    return q @ (scale * site.parts["deft_R"] - m.T @ site.weight)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "linear": lambda x: x,
}


def peanut(site: Site) -> Array:
    """scaling B f(Wᵀ Aᵀ)ᵀ, f a net whose decoders add back what the encoders were given (arXiv 2410.01870)."""
    act, depth = ACTIVATIONS[site.config["act_fn"]], site.config["depth"]
    x = act(site.weight.T @ site.parts["peanut_A.weight"].T)
    kept = []
    for i in range(depth):
        kept.append(x)
        x = act(x @ site.parts[f"peanut_encoders.{i}.weight"].T)
    for i in range(depth):
        x = act(x @ site.parts[f"peanut_decoders.{i}.weight"].T) + kept.pop()
    return site.config["scaling"] * (x @ site.parts["peanut_B.weight"].T).T


def glora(site: Site) -> Pair:
    """W + W ⊙ A + B and b + b ⊙ D + E + W C, all from the W and b before the merge (arXiv 2306.07967)."""
    w = site.weight
    merged = w + w * _path(site, "A") + _path(site, "B")
    if site.bias is None:
        return merged, None
    return merged, site.bias + site.bias * _path(site, "D") + _path(site, "E") + np.ravel(w @ _path(site, "C"))


def _path(site: Site, letter: str) -> Array:
    """Give one of GLoRA's supports, whichever way it is stored."""
    name = f"glora_{letter}"
    if f"{name}.Xd" in site.parts:
        return site.parts[f"{name}.Xd"] @ site.parts[f"{name}.Xu"]
    return site.parts[f"{name}.X"] if f"{name}.X" in site.parts else site.parts[f"{name}.zeros"]


def beft(site: Site) -> Pair:
    """W and b + the adapter's bias."""
    return site.weight, site.bias + site.parts["beft_bias"].ravel()


DELTAS: dict[str, Callable[[Site], Array]] = {
    "ADALORA": adalora,
    "LOHA": loha,
    "LOKR": lokr,
    "VBLORA": vblora,
    "DELORA": delora,
    "GRALORA": gralora,
    "TINYLORA": tinylora,
    "SHIRA": shira,
    "SUPERTUNING": supertuning,
    "C3A": c3a,
    "HIRA": hira,
    "DEFT": deft,
    "PEANUT": peanut,
}
PAIRS: dict[str, Callable[[Site], Pair]] = {"LORA": lora, "GLORA": glora, "BEFT": beft}

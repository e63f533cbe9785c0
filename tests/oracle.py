"""Say what a merge must give, in plain float64, and nothing else.

A second and deliberately stupid implementation: no tiles, no torch, no safetensors package, and no line of
lora_check.  It is told the kind of each module and never guesses one from a shape; what it cannot say, it
raises.
"""

from __future__ import annotations

import json
import math
import re
import struct

import numpy as np

Array = np.ndarray
Tensors = dict[str, Array]
Adapter = tuple[dict, Tensors]  # adapter_config.json, tensors of the adapter file
Roles = dict[str, dict[str, Array]]  # module path -> role -> tensor

# --- storage dtypes -------------------------------------------------------------------------------------

# bits of the significand with the hidden one, least exponent of a normal number, greatest exponent
FORMATS = {"fp16": (11, -14, 15), "bf16": (8, -126, 127), "fp32": (24, -126, 127)}


def _quantum(x: Array, dtype: str) -> Array:
    """Give the exponent of the last place of dtype at each finite x."""
    bits, least, greatest = FORMATS[dtype]
    # frexp reads the exponent field itself, so no logarithm can be off by one at a power of two
    _, exponent = np.frexp(x)
    exponent = np.where(x == 0, least, exponent - 1)  # frexp calls 1.0 one half times two
    return np.clip(exponent, least, greatest) - (bits - 1)  # below `least` the spacing no longer shrinks


def ulp(x: Array | float, dtype: str) -> Array:
    """Give the distance between neighbours of dtype at x, away from zero; NaN where x is not finite."""
    x = np.asarray(x, np.float64)
    finite = np.isfinite(x)
    return np.where(finite, np.ldexp(1.0, _quantum(np.where(finite, x, 1.0), dtype)), np.nan)


def round_to(x: Array | float, dtype: str) -> Array:
    """Round float64 to the nearest number of dtype, ties to even, subnormals kept, overflow to infinity."""
    x = np.asarray(x, np.float64)
    finite = np.isfinite(x)
    safe = np.where(finite, x, 0.0)
    quantum = _quantum(safe, dtype)
    # scaling by a power of two is exact, and rint rounds half to even: one rounding, straight from float64
    rounded = np.ldexp(np.rint(np.ldexp(safe, -quantum)), quantum)
    bits, _, greatest = FORMATS[dtype]
    biggest = math.ldexp(2.0 - math.ldexp(1.0, 1 - bits), greatest)
    # rint has already carried everything from half an ulp above the biggest to the next power of two
    rounded = np.where(np.abs(rounded) > biggest, np.copysign(np.inf, safe), rounded)
    return np.where(finite, rounded, x)


# --- files ----------------------------------------------------------------------------------------------

_FLOATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}
_RAW = {
    "BF16": "<u2",
    "F16": "<u2",
    "F32": "<u4",
    "F64": "<u8",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "u1",
    "BOOL": "u1",
}

Stored = tuple[str, Array]  # dtype as this module spells it, bit patterns


def values(stored: Stored) -> Array:
    """Turn bit patterns into float64, or leave integers be."""
    dtype, bits = stored
    if dtype == "bf16":  # a bfloat16 is the upper half of a float32
        dtype, bits = "fp32", bits.astype(np.uint32) << 16
    if dtype not in ("fp16", "fp32", "fp64"):
        return bits.astype(np.int64)
    width = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}[dtype]
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return bits.view(width).astype(np.float64)


def read_safetensors(path: object) -> dict[str, Stored]:
    """Read one safetensors file by hand: length, JSON header, bytes."""
    with open(str(path), "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    header.pop("__metadata__", None)
    tensors: dict[str, Stored] = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        raw = np.frombuffer(data[start:stop], _RAW[entry["dtype"]])
        tensors[name] = (_FLOATS.get(entry["dtype"], entry["dtype"]), raw.reshape(entry["shape"]))
    return tensors


def read_json(path: object) -> dict:
    """Read a JSON object, keeping the order its keys have in the file."""
    with open(str(path), encoding="utf-8") as file:
        return json.load(file)


def read_index(path: object) -> dict[str, Stored]:
    """Read every shard that a safetensors index names, and only what the index says is there."""
    folder = str(path).replace("\\", "/").rpartition("/")[0]
    where = read_json(path)["weight_map"]
    shards = {file: read_safetensors(f"{folder}/{file}") for file in set(where.values())}
    return {name: shards[file][name] for name, file in where.items()}


# --- the adapter's own words ----------------------------------------------------------------------------

_ROLES = {
    ("lora_A", "weight"): "A",
    ("lora_B", "weight"): "B",
    ("lora_B", "bias"): "B.bias",
    ("lora_magnitude_vector", "weight"): "m",
    ("token_adapter", "trainable_tokens_delta"): "rows",
}
_SHORT_ROLES = {
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
    "trainable_tokens_delta": "rows",
}


def parse_key(key: str) -> tuple[str, str, bool]:
    """Split a PEFT key into module path, role, and whether it went through a wrapper.

    A role that is no adapter parameter, such as 'weight', names a base tensor to be replaced.
    """
    prefix = "base_model.model."
    if not key.startswith(prefix):
        raise ValueError(f"not a PEFT key: {key}")
    parts = key[len(prefix) :].split(".")
    wrapped = "base_layer" in parts
    parts = [part for part in parts if part != "base_layer"]
    if tuple(parts[-2:]) in _ROLES:
        return ".".join(parts[:-2]), _ROLES[tuple(parts[-2:])], wrapped  # type: ignore[index]
    return ".".join(parts[:-1]), _SHORT_ROLES.get(parts[-1], parts[-1]), wrapped


def parse(tensors: Tensors) -> tuple[Roles, Tensors]:
    """Split an adapter file into adapter parameters by module, and whole tensors that replace the base's."""
    roles: Roles = {}
    whole: dict[str, tuple[str, bool, Array]] = {}
    for key, tensor in tensors.items():
        path, role, wrapped = parse_key(key)
        if role in ("A", "B", "B.bias", "m", "rows"):
            roles.setdefault(path, {})[role] = tensor
        elif wrapped or f"{path}.{role}" not in whole:
            whole[f"{path}.{role}"] = (path, wrapped, tensor)
    # a wrapped module's own tensor is called base_layer.weight, so its plain name reaches nobody
    kept = {name: tensor for name, (path, wrapped, tensor) in whole.items() if wrapped or path not in roles}
    return roles, kept


def pattern_value(patterns: dict | None, path: str, default: float) -> float:
    """Look a module up in rank_pattern or alpha_pattern: the first match in file order."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def rank_and_scale(config: dict, path: str) -> tuple[int, float]:
    """Give r and s of one module as its config has them."""
    rank = pattern_value(config.get("rank_pattern"), path, config["r"])
    alpha = pattern_value(config.get("alpha_pattern"), path, config["lora_alpha"])
    return int(rank), alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


# --- formulas -------------------------------------------------------------------------------------------


def delta_linear(a: Array, b: Array, s: float) -> Array:
    """s B A, laid out (out, in)."""
    return s * (b @ a)


def delta_conv1d_t(a: Array, b: Array, s: float) -> Array:
    """s (B A) transposed: a transformers Conv1D is laid out (in, out)."""
    return s * (b @ a).T


def delta_embedding(a: Array, b: Array, s: float) -> Array:
    """s (B A) transposed, laid out (vocab, dim), from A (r, vocab) and B (dim, r)."""
    return s * (b @ a).T


def delta_conv(a: Array, b: Array, s: float) -> Array:
    """Go over the kernel place by place: A (r, in, k...), B (out, r, 1...)."""
    factor = b.reshape(b.shape[0], b.shape[1])
    delta = np.zeros((b.shape[0], *a.shape[1:]))
    for place in np.ndindex(a.shape[2:]):
        where = (slice(None), slice(None), *place)
        delta[where] = s * (factor @ a[where])
    return delta


DELTAS = {
    "linear": delta_linear,
    "conv1d_t": delta_conv1d_t,
    "embedding": delta_embedding,
    "conv": delta_conv,
    "mha": delta_linear,  # in_proj: query, key and value stacked on the output axis
    "mha_out": lambda a, b, s: 2 * delta_linear(a, b, s),  # PEFT adds it, then merges the wrapped Linear too
}

# the axis that counts outputs; the length of everything else is what DoRA divides by
OUTPUT_AXIS = {"linear": 0, "conv": 0, "conv1d_t": 1, "embedding": 1}


def lengths(moved: Array, kind: str) -> Array:
    """Measure W + delta along everything but its outputs, shaped to broadcast against it."""
    axis = OUTPUT_AXIS[kind]
    others = tuple(i for i in range(moved.ndim) if i != axis)
    return np.sqrt(np.sum(moved * moved, axis=others, keepdims=True))


def dora(moved: Array, magnitude: Array, kind: str) -> Array:
    """Rescale W + delta so that each output has the length its magnitude says."""
    norm = lengths(moved, kind)
    if magnitude.size != norm.size:
        raise ValueError(f"{magnitude.size} magnitudes for {norm.size} outputs")
    return moved * magnitude.reshape(norm.shape) / norm


# --- the whole checkpoint -------------------------------------------------------------------------------


def kind_of(path: str, kinds: dict[str, str]) -> str:
    """Give the kind of an adapted module; the out_proj inside an attention has its own."""
    parent, _, leaf = path.rpartition(".")
    if leaf == "out_proj" and kinds.get(parent) == "mha":
        return "mha_out"
    return kinds[path]


def weight_name(path: str, kinds: dict[str, str], tied: dict[str, str]) -> str:
    """Name the base tensor that a module's delta goes to."""
    name = f"{path}.in_proj_weight" if kind_of(path, kinds) == "mha" else f"{path}.weight"
    return tied.get(name, name)


def token_indices(config: dict, path: str) -> list[int]:
    """Find the rows that a trainable-tokens tensor replaces."""
    found = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(found, dict):
        matches = [rows for name, rows in found.items() if path == name or path.endswith(f".{name}")]
        if len(matches) != 1:
            raise ValueError(f"{len(matches)} entries of trainable_token_indices for {path}")
        return matches[0]
    if not found:
        raise ValueError(f"no token indices for {path}")
    return found


def touched(adapters: list[Adapter], kinds: dict[str, str], tied: dict[str, str] | None = None) -> set[str]:
    """Name every tensor that takes a delta, weights and biases."""
    names: set[str] = set()
    for _, tensors in adapters:
        for path, roles in parse(tensors)[0].items():
            names |= {weight_name(path, kinds, tied or {})} if "A" in roles else set()
            names |= {f"{path}.bias"} if "B.bias" in roles else set()
    return names


def expected_checkpoint(
    base: Tensors,
    adapters: list[Adapter],
    kinds: dict[str, str],
    *,
    tied: dict[str, str] | None = None,
    round_factors: str | None = None,
    round_between: str | None = None,
) -> Tensors:
    """Apply adapters one after the other and give every tensor the merged model must hold, in float64.

    base has the names of the in-memory model; tied maps a tensor's name to the name it shares storage with.
    round_factors rounds every adapter parameter first; round_between rounds what replaces a base tensor, and
    the result of every adapter but the last, as a model held in that dtype does.
    """
    if sum(any("m" in roles for roles in parse(tensors)[0].values()) for _, tensors in adapters) > 1:
        raise ValueError("two DoRA adapters in one call: releases disagree about the second norm")
    made = {name: np.array(tensor) for name, tensor in base.items()}
    tied = tied or {}
    for number, (config, tensors) in enumerate(adapters):
        roles, whole = parse(tensors)
        # where both names of a tied tensor are carried, the alias is loaded last: lm_head after embed_tokens
        for name, tensor in sorted(whole.items(), key=lambda item: item[0] in tied):
            made[tied.get(name, name)] = _maybe_round(np.array(tensor), round_between)
        for path, parameters in roles.items():
            rounded = {role: _maybe_round(tensor, round_factors) for role, tensor in parameters.items()}
            last = number == len(adapters) - 1
            for name in _apply(made, path, rounded, config, kinds, tied):
                made[name] = made[name] if last else _maybe_round(made[name], round_between)
    return made


def _maybe_round(tensor: Array, dtype: str | None) -> Array:
    """Round when asked to."""
    return round_to(tensor, dtype) if dtype else tensor


def _apply(
    made: Tensors,
    path: str,
    roles: dict[str, Array],
    config: dict,
    kinds: dict[str, str],
    tied: dict[str, str],
) -> list[str]:
    """Change the tensors of one module in place and name them."""
    name = weight_name(path, kinds, tied)
    if "rows" in roles:
        made[name] = made[name].copy()
        made[name][token_indices(config, path)] = roles["rows"]
    if not {"A", "B"} & set(roles):
        return [name]
    kind = kind_of(path, kinds)
    made[name] = _add(made[name], path, roles, config, kind)
    if "B.bias" not in roles:
        return [name]
    made[f"{path}.bias"] = made[f"{path}.bias"] + rank_and_scale(config, path)[1] * roles["B.bias"]
    return [name, f"{path}.bias"]


def _add(weight: Array, path: str, roles: dict[str, Array], config: dict, kind: str) -> Array:
    """Add one module's delta to its weight, and rescale where there is a magnitude."""
    # out_proj gets the rank and alpha of the attention around it
    rank, scale = rank_and_scale(config, path.rpartition(".")[0] if kind == "mha_out" else path)
    if roles["A"].shape[0] != rank or roles["B"].shape[1] != rank:
        raise ValueError(f"{path}: config says r={rank}, A is {roles['A'].shape}, B is {roles['B'].shape}")
    delta = DELTAS[kind](roles["A"], roles["B"], scale)
    if delta.shape != weight.shape:
        raise ValueError(f"{path}: delta is {delta.shape}, weight is {weight.shape}")
    moved = weight + delta
    return dora(moved, roles["m"], kind) if "m" in roles else moved

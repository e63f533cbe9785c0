"""Hold the NumPy formulas of the multiplicative tuners against merges that PEFT itself made, in fp32.

PEFT computes in fp32 and the oracle in float64 from the same stored numbers, so what lies between them is fp32
roundoff: U a rounding, and gamma(n) for n of them on one way to the result (Higham 2002, chapter 3).  Each bound
below is a count of roundings times the same formula on absolute values; one rounding more covers what is of second
order.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import peft
import pytest
import torch
from oracle_tuners import multiplicative as tuners
from torch import nn
from transformers.pytorch_utils import Conv1D

torch.set_num_threads(1)

U = 2.0**-24
Array = np.ndarray
PREFIX = "base_model.model.site."

EXPECTED_WARNINGS = (
    r"Unsupported layer type '<class 'torch\.nn\.modules\.normalization\.LayerNorm'>'",
    r"Invalid `(r|oft_block_size)` \(\d+\)! Adjusted",
    r"Setting `save_embedding_layers` to `True` as embedding layers found",
    r"Could not find a config file in None",
)


def gamma(roundings: float) -> float:
    """Bound the relative error of a way with so many roundings."""
    return roundings * U / (1 - roundings * U)


# --- making -----------------------------------------------------------------------------------------------


class Host(nn.Module):
    """Hold the layer in question and a bystander."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.site = site
        self.other = nn.Linear(5, 3)


@dataclass(frozen=True)
class Made:
    """One merge of PEFT's: what it read and what it wrote for the layer."""

    tensors: tuners.Tensors
    config: dict
    weight: Array
    bias: Array | None
    merged: tuple[Array, Array | None]


Bound = Callable[[Made], tuple[Array, Array]]  # what roundoff can do to weight and bias


@dataclass(frozen=True)
class Case:
    """Say how PEFT is asked, which formula answers, and how far they may be apart."""

    layer: Callable[[], nn.Module]
    config: Callable[..., peft.PeftConfig]
    settings: Mapping[str, Any]
    formula: Callable[..., tuners.Merged]
    bound: Bound
    options: Mapping[str, Any] = field(default_factory=dict)
    has_size: bool = True  # twice the trained tensors is another merge; not so for directions


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """BOFT tries to compile a CUDA kernel for each layer, and does without where it cannot."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)


def make_base(layer: Callable[[], nn.Module]) -> Host:
    """Build a host in which no parameter is constant."""
    torch.manual_seed(7)
    host = Host(layer())
    for parameter in host.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    return host


def train(host: Host, config: peft.PeftConfig, folder: Path, seed: int = 11) -> None:
    """Save an adapter of which every number has moved."""
    torch.manual_seed(seed)
    tuned = peft.get_peft_model(copy.deepcopy(host), config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(folder)


def read(folder: Path) -> tuple[tuners.Tensors, dict]:
    """Read the layer's tensors by suffix, and the configuration."""
    stored = oracle.read_safetensors(folder / "adapter_model.safetensors")
    tensors = {key[len(PREFIX) :]: oracle.values(value) for key, value in stored.items() if key.startswith(PREFIX)}
    tensors.pop("base_layer.weight", None)  # a targeted embedding carries its base along
    return tensors, oracle.read_json(folder / "adapter_config.json")


def parameters_of(layer: nn.Module) -> tuple[Array, Array | None]:
    """Give weight and bias in float64."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert weight.dtype == torch.float32
    return weight.detach().double().numpy(), None if bias is None else bias.detach().double().numpy()


def produce(case: Case, folder: Path, *, safe: bool = False) -> Made:
    """Train, save, load again and merge."""
    host = make_base(case.layer)
    train(host, case.config(**case.settings), folder)
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(host), folder).merge_and_unload(safe_merge=safe)
    return Made(*read(folder), *parameters_of(host.site), parameters_of(merged.site))


def expected(case: Case, made: Made) -> tuners.Merged:
    """Ask the formula."""
    return case.formula(made.tensors, made.config, made.weight, made.bias, **case.options)


def agrees(case: Case, made: Made, tensors: tuners.Tensors | None = None) -> bool:
    """Compare what PEFT wrote with what the formula says, of these tensors if they are others than the file's."""
    weight, bias = expected(case, replace(made, tensors=tensors or made.tensors))
    weight_bound, bias_bound = case.bound(made)
    actual, actual_bias = made.merged
    if actual.shape != weight.shape or (bias is None) != (actual_bias is None):
        return False
    right = bool(np.all(np.abs(actual - weight) <= weight_bound))
    return right and (bias is None or bool(np.all(np.abs(actual_bias - bias) <= bias_bound)))


# --- bounds -----------------------------------------------------------------------------------------------


def nothing(made: Made) -> tuple[Array, Array]:
    """A copy has no roundings."""
    return np.zeros(()), np.zeros(())


def once(made: Made) -> tuple[Array, Array]:
    """One product or one sum: U of the result."""
    weight, bias = made.merged
    return gamma(2) * np.abs(weight), gamma(2) * np.abs(np.zeros(()) if bias is None else bias)


def rotated(made: Made, blocks: Array, *, shared: bool) -> tuple[Array, Array]:
    """Bound |dR| |W|^T given a bound on each block of R."""
    size = made.weight[0].size
    return tuners.rotate_inputs(tuners.block_diagonal(blocks, size, shared=shared), np.abs(made.weight)), np.zeros(())


def solve_bound(skew: Array) -> float:
    """Bound any entry of R - (I - Q)(I + Q)^-1, R solved from R (I + Q) = I - Q by elimination.

    Each row of R solves a system with E added to I + Q, |E| <= gamma(3n) |L| |U| (Higham 2002, theorem 9.4), and
    |L| |U| is at most n (1 + |Q|^2) in norm, since the symmetric part is I (Golub and Van Loan 2013, section 4.2)
    and no rows are exchanged where each diagonal 1 dominates its column.  Rows of R have length 1 and (I + Q)^-1 at
    most 1.
    """
    assert np.abs(skew).sum(axis=1).max() < 1
    n = skew.shape[-1]
    return (gamma(3 * n) + U) * n * (1 + np.linalg.norm(skew, 2, axis=(1, 2)).max() ** 2)


def frobenius(blocks: Array) -> float:
    """Measure the longest block."""
    return float(np.sqrt(np.sum(blocks * blocks, axis=(1, 2)).max()))


def oft_bound(made: Made) -> tuple[Array, Array]:
    """Count for COFT, the series or the solution, and the product with W of inner size n.

    COFT: n^2 squares and their sum, halved by the root, a division, a product, and three roundings of eps.  Series:
    power k takes k - 1 products of inner size n, and each of the powers is added once; a relative error of Q counts
    once a power.  Solution: as above, and an error of Q enters twice.  W: gamma(n) |R| |W|^T.
    """
    config = made.config
    (packed,) = made.tensors.values()
    skew = tuners.unpack_skew(packed)
    n = skew.shape[-1]
    drift = n * n / 2 + 6 if config["coft"] else 0
    skew = tuners.project(skew, config["eps"]) if config["coft"] else skew
    if config["use_cayley_neumann"]:
        powers = max(config["num_cayley_neumann_terms"], 4) - 1
        error = gamma(powers * (n + 1 + drift) + 1) * tuners.neumann(np.abs(skew), config["num_cayley_neumann_terms"])
    else:
        error = solve_bound(skew) + 2 * gamma(drift) * frobenius(skew) + gamma(n + 1) * np.abs(tuners.cayley(skew))
    if "oft_embedding_R.weight" in made.tensors:
        turned = np.swapaxes(error, 1, 2)  # W R is (R^T W^T)^T
        return rotated(made, turned, shared=config["block_share"])
    return rotated(made, error, shared=config["block_share"])


def boft_bound(made: Made) -> tuple[Array, Array]:
    """As the solution above; the difference that makes X skew rounds once and the product with s once."""
    skew = tuners.skew_part(made.tensors["boft_R"][0])
    n = skew.shape[-1]
    error = solve_bound(skew) + 2 * U * frobenius(skew) + gamma(n + 2) * np.abs(tuners.cayley(skew))
    bound, rest = rotated(made, error, shared=False)
    return bound * np.abs(made.tensors["boft_s"]).reshape(-1, *[1] * (bound.ndim - 1)), rest


def hra_bound(made: Made) -> tuple[Array, Array]:
    """Bound the product of r reflections in n dimensions, then W times it.

    A unit vector has the error n / 2 + 2: n squares summed and rooted, one division.  Each reflection H - 2 H u u^T
    takes n for H u, two more for the outer product and the difference, and u twice: 2n + 6 of |H| (I + 2 |u| |u|^T).
    """
    if made.config["apply_GS"]:
        return _orthogonal_bound(made)
    units = tuners.unit_columns(made.tensors["hra_u"], orthogonal=False)
    n, r = units.shape
    size = np.abs(made.weight.reshape(len(made.weight), -1))
    for u in np.abs(units).T:
        size = size + 2 * np.outer(size @ u, u)
    return (gamma(r * (2 * n + 6) + n + 1) * size).reshape(made.weight.shape), np.zeros(())


def _orthogonal_bound(made: Made) -> tuple[Array, Array]:
    """Follow Gram and Schmidt: e_i, the error of unit vector i, in norm.

    Taking (w u) w off u moves u by 2 e_w and n + 3 roundings of its length; what is left of u is shorter by the
    factor kappa, which divides all that, and the division adds n / 2 + 2.  H = I - 2 U U^T moves by 4 times the sum
    of the e_i in norm, and by r + 2 roundings of its terms; W H takes n more.
    """
    columns, units = made.tensors["hra_u"], tuners.unit_columns(made.tensors["hra_u"], orthogonal=True)
    n, r = units.shape
    errors: list[float] = []
    for i in range(r):
        kappa = np.linalg.norm(columns[:, i]) / abs(columns[:, i] @ units[:, i])
        errors.append(kappa * sum(2 * e + gamma(n + 3) for e in errors) + gamma(n / 2 + 3))
    size = np.eye(n) + 2 * np.abs(units) @ np.abs(units).T
    flat = np.abs(made.weight.reshape(len(made.weight), -1))
    lengths = np.sqrt(np.sum(flat * flat, axis=1, keepdims=True))
    return (lengths * 4 * sum(errors) + gamma(n + r + 3) * flat @ size).reshape(made.weight.shape), np.zeros(())


def road_bound(made: Made) -> tuple[Array, Array]:
    """A cosine or sine is good to an ulp, 2 U; times alpha, times w, and one sum: 5."""
    group = made.config["group_size"]
    theta, alpha = made.tensors["road_theta"], made.tensors["road_alpha"]
    cosines, sines = (np.abs(f) for f in tuners.road_factors(theta, alpha, made.config["variant"], group))
    partners = np.arange(cosines.size).reshape(-1, 2, group // 2)[:, ::-1].reshape(-1)
    weight, bias = np.abs(made.weight), np.zeros(cosines.size) if made.bias is None else np.abs(made.bias)
    sizes = cosines[:, None] * weight + sines[:, None] * weight[partners]
    return gamma(6) * sizes, gamma(6) * (cosines * bias + sines * bias[partners])


def bat_bound(made: Made) -> tuple[Array, Array]:
    """W D of inner size r, plus D, plus W."""
    sizes = {suffix: np.abs(tensor) for suffix, tensor in made.tensors.items()}
    weight, _ = tuners.miss(sizes, made.config, np.abs(made.weight), None)
    return gamma(made.config["r"] + 3) * weight, np.zeros(())


# --- the table ----------------------------------------------------------------------------------------------


def linear() -> nn.Module:
    return nn.Linear(12, 8)


def conv() -> nn.Module:
    return nn.Conv2d(4, 6, 3)


def _ia3(layer: Callable[[], nn.Module], feedforward: list[str] | str, kind: str = "linear", **settings: Any) -> Case:
    settings = {"target_modules": ["site"], "feedforward_modules": feedforward, **settings}
    return Case(layer, peft.IA3Config, settings, tuners.ia3, once, {"path": "site", "kind": kind})


def _oft(layer: Callable[[], nn.Module], **settings: Any) -> Case:
    settings = {"target_modules": ["site"], "r": 0, "oft_block_size": 4, **settings}
    return Case(layer, peft.OFTConfig, settings, tuners.oft, oft_bound, has_size="eps" not in settings)


def _hra(layer: Callable[[], nn.Module], **settings: Any) -> Case:
    settings = {"target_modules": ["site"], **settings}
    return Case(layer, peft.HRAConfig, settings, tuners.hra, hra_bound, has_size=False)


def _road(variant: str, group_size: int, layer: Callable[[], nn.Module]) -> Case:
    settings = {"target_modules": ["site"], "variant": variant, "group_size": group_size}
    return Case(layer, peft.RoadConfig, settings, tuners.road, road_bound)


def _miss(layer: Callable[[], nn.Module], bound: Bound = once, **settings: Any) -> Case:
    return Case(layer, peft.MissConfig, {"target_modules": ["site"], **settings}, tuners.miss, bound)


def _boft(layer: Callable[[], nn.Module]) -> Case:
    return Case(layer, peft.BOFTConfig, {"target_modules": ["site"], "boft_block_size": 4}, tuners.boft, boft_bound)


CASES: Mapping[str, Case] = {
    "ia3-outputs": _ia3(lambda: nn.Linear(10, 14), []),
    "ia3-inputs": _ia3(lambda: nn.Linear(10, 14), ["ite"], target_modules="site"),
    "ia3-inputs-by-regex": _ia3(lambda: nn.Linear(10, 14, bias=False), "s.*e"),
    "ia3-outputs-by-regex": _ia3(lambda: nn.Linear(10, 14), "sit"),
    "ia3-conv1d-outputs": _ia3(lambda: Conv1D(14, 10), [], "conv1d_t", fan_in_fan_out=True),
    "ia3-conv1d-inputs": _ia3(lambda: Conv1D(14, 10), ["site"], "conv1d_t", fan_in_fan_out=True),
    "ia3-conv2d-outputs": _ia3(lambda: nn.Conv2d(4, 6, (3, 2)), [], "conv"),
    "ia3-conv2d-inputs": _ia3(lambda: nn.Conv2d(4, 6, (3, 2)), ["site"], "conv"),
    "ia3-conv2d-inputs-in-groups": _ia3(lambda: nn.Conv2d(4, 6, (3, 2), groups=2), ["site"], "conv"),
    "ia3-conv3d-outputs": _ia3(lambda: nn.Conv3d(3, 5, (2, 1, 3)), [], "conv"),
    "ia3-conv3d-inputs": _ia3(lambda: nn.Conv3d(3, 5, (2, 1, 3), bias=False), ["site"], "conv"),
    "oft": _oft(linear),
    "oft-2-terms": _oft(linear, num_cayley_neumann_terms=2),
    "oft-3-terms": _oft(linear, num_cayley_neumann_terms=3),
    "oft-4-terms": _oft(linear, num_cayley_neumann_terms=4),
    "oft-7-terms": _oft(linear, num_cayley_neumann_terms=7),
    "oft-by-r": _oft(linear, r=2, oft_block_size=0),
    "oft-adjusted": _oft(linear, oft_block_size=5),
    "oft-shared": _oft(linear, block_share=True),
    "oft-exact": _oft(linear, use_cayley_neumann=False),
    "oft-exact-shared": _oft(linear, use_cayley_neumann=False, block_share=True),
    "oft-coft": _oft(linear, coft=True, eps=0.6),
    "oft-coft-exact": _oft(linear, coft=True, eps=0.6, use_cayley_neumann=False),
    "oft-coft-inside": _oft(linear, coft=True, eps=40.0),
    "oft-conv2d": _oft(conv),
    "oft-conv2d-exact-shared": _oft(conv, use_cayley_neumann=False, block_share=True),
    "oft-embedding": _oft(lambda: nn.Embedding(20, 12)),
    "oft-embedding-exact": _oft(lambda: nn.Embedding(20, 12), use_cayley_neumann=False),
    "boft": _boft(linear),
    "boft-conv2d": _boft(conv),
    "hra-random-start": _hra(linear, r=3, init_weights=False),
    "hra": _hra(linear, r=4),
    "hra-orthogonal": _hra(linear, r=3, apply_GS=True, init_weights=False),
    "hra-conv2d": _hra(conv, r=2),
    "hra-conv2d-orthogonal": _hra(conv, r=3, apply_GS=True, init_weights=False),
    "road-1": _road("road_1", 4, lambda: nn.Linear(10, 16)),
    "road-2": _road("road_2", 8, lambda: nn.Linear(10, 16)),
    "road-4": _road("road_4", 4, lambda: nn.Linear(10, 16, bias=False)),
    "road-4-one-group": _road("road_4", 16, lambda: nn.Linear(10, 16)),
    "miss": _miss(linear, r=4),
    "miss-remainder": _miss(linear, r=5),
    "miss-random-start": _miss(linear, r=3, init_weights=False),
    "miss-mini": _miss(linear, r=4, init_weights="mini", mini_r=2),
    "miss-mini-remainder": _miss(linear, r=7, init_weights="mini", mini_r=4),
    "miss-bat": _miss(linear, bat_bound, r=4, init_weights="bat"),
    "ln-tuning": Case(
        lambda: nn.LayerNorm(9), peft.LNTuningConfig, {"target_modules": ["site"]}, tuners.ln_tuning, nothing
    ),
    "ln-tuning-no-bias": Case(
        lambda: nn.LayerNorm(9, bias=False),
        peft.LNTuningConfig,
        {"target_modules": ["site"]},
        tuners.ln_tuning,
        nothing,
    ),
    "tokens": Case(
        lambda: nn.Embedding(20, 12),
        peft.TrainableTokensConfig,
        {"target_modules": ["site"], "token_indices": [11, 2, 19]},
        tuners.trainable_tokens,
        nothing,
    ),
    "tokens-of-lora": Case(
        lambda: nn.Embedding(20, 12),
        peft.LoraConfig,
        {"target_modules": ["other"], "trainable_token_indices": {"site": [11, 2, 19]}},
        tuners.trainable_tokens,
        nothing,
        {"path": "site"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_formula_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    made = produce(CASES[name], tmp_path)
    assert agrees(CASES[name], made)
    change = np.abs(made.merged[0] - made.weight).max()
    assert np.max(CASES[name].bound(made)[0]) < 1e-2 * change  # the bound is no licence


@pytest.mark.parametrize("name", ["ia3-outputs", "oft", "oft-exact", "boft", "hra", "road-1", "miss", "miss-bat"])
def test_a_safe_merge_is_the_same(name: str, tmp_path: Path) -> None:
    assert agrees(CASES[name], produce(CASES[name], tmp_path, safe=True))


@pytest.mark.parametrize("name", CASES)
def test_one_number_of_any_tensor_shows(name: str, tmp_path: Path) -> None:
    made = produce(CASES[name], tmp_path)
    for suffix, tensor in made.tensors.items():
        changed = tensor.copy()
        changed.flat[tensor.size // 2] += 0.05 * np.abs(tensor).max()
        assert not agrees(CASES[name], made, {**made.tensors, suffix: changed}), suffix


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.has_size])
def test_twice_the_trained_tensors_shows(name: str, tmp_path: Path) -> None:
    made = produce(CASES[name], tmp_path)
    doubled = {suffix: 2 * tensor for suffix, tensor in made.tensors.items()}
    assert not agrees(CASES[name], made, doubled)


# --- formats that no living release writes ----------------------------------------------------------------------


def boft_of(x: Array, scales: Array, weight: Array, bias: Array, folder: Path) -> tuple[Array, Array, Array]:
    """Let BOFT, whose rotation theirs is, merge blocks X and scales s: the weight, the bias, the bound."""
    host = Host(nn.Linear(weight.shape[1], weight.shape[0]))
    host.site.weight.data.copy_(torch.from_numpy(weight))
    host.site.bias.data.copy_(torch.from_numpy(bias))
    config = peft.BOFTConfig(target_modules=["site"], boft_block_size=x.shape[-1])
    tuned = peft.get_peft_model(copy.deepcopy(host), config)
    tuned.base_model.model.site.boft_R["default"].data.copy_(torch.from_numpy(x[None]))
    tuned.base_model.model.site.boft_s["default"].data.copy_(torch.from_numpy(scales))
    tuned.save_pretrained(folder)
    merged = peft.PeftModel.from_pretrained(host, folder).merge_and_unload()
    made = Made(*read(folder), *parameters_of(host.site), parameters_of(merged.site))
    return *made.merged, boft_bound(made)[0]


def drawn(*shape: int, seed: int, spread: float = 1.0, centre: float = 0.0) -> Array:
    """Draw numbers that fp32 holds."""
    numbers = np.random.default_rng(seed).normal(centre, spread, shape)
    return numbers.astype(np.float32).astype(np.float64)


PLAIN = {"coft": False, "block_share": False}


@pytest.mark.parametrize("shared", [False, True])
def test_oft_of_0_14_and_0_15_is_boft_of_factor_one(shared: bool, tmp_path: Path) -> None:
    weight, bias, scales = drawn(8, 12, seed=1), drawn(8, seed=2), drawn(8, 1, seed=3, centre=1)
    x = drawn(1 if shared else 3, 4, 4, seed=4, spread=0.15)
    actual, actual_bias, bound = boft_of(np.repeat(x, 3, axis=0) if shared else x, scales, weight, bias, tmp_path)
    config = {**PLAIN, "block_share": shared}
    made, made_bias = tuners.oft({"oft_r": x, "oft_s": scales}, config, weight, bias)
    assert np.all(np.abs(made - actual) <= bound)
    assert np.array_equal(made_bias, actual_bias)
    for changed in ({"oft_r": 2 * x, "oft_s": scales}, {"oft_r": x, "oft_s": 2 * scales}):
        assert not np.all(np.abs(tuners.oft(changed, config, weight, bias)[0] - actual) <= bound)


@pytest.mark.parametrize("outputs", [8, 7])
def test_oft_up_to_0_13_turns_outputs(outputs: int, tmp_path: Path) -> None:
    """(W^T R)^T, where BOFT gives W (R of -X)^T, that is W R; the missing outputs of a cut block are zeros."""
    weight, bias, x = drawn(outputs, 12, seed=1), drawn(outputs, seed=2), drawn(2, 4, 4, seed=4, spread=0.15)
    transposed = np.pad(weight.T, ((0, 0), (0, 8 - outputs)))
    actual, _, bound = boft_of(-x, np.ones((12, 1)), transposed, drawn(12, seed=5), tmp_path)
    actual, bound = actual[:, :outputs].T, bound[:, :outputs].T
    assert np.all(np.abs(tuners.oft({"oft_r": x}, PLAIN, weight, bias)[0] - actual) <= bound)
    assert not np.all(np.abs(tuners.oft({"oft_r": -x}, PLAIN, weight, bias)[0] - actual) <= bound)


def test_coft_of_the_old_formats(tmp_path: Path) -> None:
    """On paper: 8 outputs, 12 inputs and blocks of 4; X has length 4, its blocks are 3 or 2.

    0.14: the ball has the radius eps ceil(8 / 3)^2 / sqrt(3).  0.7: eps 4^2 / sqrt(2).
    """
    x, weight = np.zeros((3, 4, 4)), drawn(8, 12, seed=1)
    x[:, 0, 1], x[:, 2, 2] = 2.0, np.sqrt(12.0)
    eps = 0.01
    for tensors, plain, radius in (
        ({"oft_r": x, "oft_s": np.ones((8, 1))}, {"oft_s": np.ones((8, 1))}, eps * 9 / np.sqrt(3)),
        ({"oft_r": x[:2]}, {}, eps * 16 / np.sqrt(2)),
    ):
        made, _ = tuners.oft(tensors, {**PLAIN, "coft": True, "eps": eps}, weight, None)
        wanted, _ = tuners.oft({"oft_r": tensors["oft_r"] * radius / 4, **plain}, PLAIN, weight, None)
        assert np.allclose(made, wanted, rtol=1e-14, atol=1e-14)
        assert not np.allclose(made, tuners.oft(tensors, PLAIN, weight, None)[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["miss", "miss-remainder", "miss-bat"])
def test_bone_is_miss_under_its_old_name(name: str, tmp_path: Path) -> None:
    made = produce(CASES[name], tmp_path)
    renamed = replace(made, tensors={"bone_block": made.tensors["miss_block"]})
    weight, bias = tuners.bone(renamed.tensors, made.config, made.weight, made.bias)
    assert np.all(np.abs(weight - made.merged[0]) <= CASES[name].bound(made)[0])
    assert np.array_equal(bias, made.merged[1])


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 8])
def test_the_series_of_0_16_telescopes(terms: int) -> None:
    """(I + 2Q + ... + 2Q^(t-1)) (I - Q) = I + Q - 2Q^t, and the last power once is Q^(t-1) less."""
    skew, identity = tuners.skew_part(drawn(3, 5, 5, seed=1, spread=0.3)), np.eye(5)
    series = tuners.neumann(skew, terms, (0, 17))
    rest = 2 * np.linalg.matrix_power(skew, terms)
    assert np.allclose(series @ (identity - skew), identity + skew - rest, rtol=0, atol=1e-13)
    if terms > 3:
        newer = tuners.neumann(skew, terms)
        assert np.allclose(series - newer, np.linalg.matrix_power(skew, terms - 1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["oft", "oft-3-terms", "oft-7-terms", "oft-2-terms"])
def test_the_series_of_another_release_shows(name: str, tmp_path: Path) -> None:
    older = replace(CASES[name], options={"release": (0, 17)})
    assert agrees(older, produce(CASES[name], tmp_path)) == (name == "oft-2-terms")  # nothing left to differ in


def test_boft_up_to_0_13_misread_a_kernel() -> None:
    """On paper: two outputs, one input of 2 x 2, one block; R of X = [[0, 2], [-2, 0]] in the first two of four."""
    x = np.zeros((1, 1, 4, 4))
    x[0, 0, 0, 1], x[0, 0, 1, 0] = 1.0, -1.0  # (I - S) (I + S)^-1 = [[0, -1], [1, 0]]
    tensors = {"boft_R": x, "boft_s": np.array([[1.0, 10.0]])}
    weight = np.arange(8.0).reshape(2, 1, 2, 2)
    # rows 0 and 1 of [[0, 1], [2, 3], [4, 5], [6, 7]] change places, the new first one negated
    old, _ = tuners.boft(tensors, {}, weight, None, release=(0, 13))
    assert np.allclose(old.reshape(-1), [-2, -30, 0, 10, 4, 50, 6, 70])
    new, _ = tuners.boft(tensors, {}, weight, None)
    assert np.allclose(new.reshape(-1), [-1, 0, 2, 3, -50, 40, 60, 70])


def test_what_cannot_be_said_is_refused() -> None:
    weight, ten = drawn(8, 12, seed=1), {"oft_R.weight": np.zeros((2, 6))}
    current = {**PLAIN, "use_cayley_neumann": False}
    refusals: tuple[Callable[[], object], ...] = (
        lambda: tuners.ia3({"ia3_l": np.ones((1, 12))}, {"feedforward_modules": []}, weight, None, path="m"),
        lambda: tuners.ia3({"ia3_l": np.ones((8, 1))}, {"feedforward_modules": ["m"]}, weight, None, path="m"),
        lambda: tuners.ia3({"ia3_l": np.ones((8, 1))}, {"feedforward_modules": None}, weight, None, path="m"),
        lambda: tuners.oft(ten, current, weight, None),  # two blocks of four for twelve inputs
        lambda: tuners.oft({"oft_R.weight": np.zeros((2, 5))}, current, weight, None),  # no triangle
        lambda: tuners.boft({"boft_R": np.zeros((2, 3, 4, 4)), "boft_s": np.ones((8, 1))}, {}, weight, None),
        lambda: tuners.road_factors(np.zeros(8), np.zeros(8), "road_3", 4),
        lambda: tuners.bone({"bone_block": np.zeros((4, 8))}, {"init_weights": "mini"}, weight, None),
        lambda: tuners.miss({"miss_block": np.zeros((3, 4, 4))}, {"init_weights": "bat"}, weight, None),
        lambda: tuners.miss({"miss_block": np.zeros((4, 2))}, {"init_weights": "mini", "mini_r": 4}, weight, None),
    )
    for ask in refusals:
        with pytest.raises(ValueError, match=r"\w"):
            ask()

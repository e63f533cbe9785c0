"""Hold the NumPy rules of several LoRA adapters, and of bases that PEFT takes apart, against live PEFT in fp32.

As in test_oracle_multiplicative, what lies between PEFT and the oracle is fp32 roundoff: U a rounding, gamma(n) for n
of them on one way, times the same formula on absolute values.  Where PEFT asks LAPACK, its answer is measured: the
residual and the lost orthogonality of the very factors it returned say which matrix they are the exact SVD of, and
perturbation theory says how far the truncation of that one may lie from the truncation of ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import peft
import pytest
import torch
from oracle_tuners import combinations as rules
from oracle_tuners import multiplicative as tuners
from oracle_tuners.combinations import Options, Part
from torch import nn
from transformers.pytorch_utils import Conv1D

torch.set_num_threads(1)

U = 2.0**-24
Array = np.ndarray

# path -> kind; every matrix has a shape of its own
KINDS = {"lin": "linear", "conv": "conv", "emb": "embedding", "gpt": "conv1d_t"}
TURNED = ("embedding", "conv1d_t")  # stored (in, out)
EXPECTED_WARNINGS = (
    r"fan_in_fan_out is set to (True|False) but the target module is",
    r"Setting `save_embedding_layers` to `True` as embedding layers found",
    r"Could not find a config file in None",
    r"Adapter .* was active which is now deleted",
)


@pytest.fixture(autouse=True)
def _expected_warnings() -> None:
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)


def gamma(roundings: float) -> float:
    """Bound the relative error of a way with so many roundings."""
    return roundings * U / (1 - roundings * U)


# --- live adapters ------------------------------------------------------------------------------------------


class Host(nn.Module):
    """Hold one layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(9, 7)
        self.conv = nn.Conv2d(3, 5, (2, 3))
        self.emb = nn.Embedding(11, 8)
        self.gpt = Conv1D(6, 10)


CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "x": {"r": 3, "lora_alpha": 7},
    "y": {"r": 3, "lora_alpha": 5, "alpha_pattern": {"conv": 11}},
    "z": {"r": 3, "lora_alpha": 2},
    "root": {"r": 3, "lora_alpha": 7, "use_rslora": True},
    "thin": {"r": 2, "lora_alpha": 5},
    "mixed": {"r": 2, "lora_alpha": 3, "rank_pattern": {"emb": 4, "lin": 1}},
    "dora": {"r": 2, "lora_alpha": 5, "use_dora": True},
    "dora2": {"r": 3, "lora_alpha": 7, "use_dora": True, "use_rslora": True},
}


def make_host() -> Host:
    """Build the base, the same each time."""
    torch.manual_seed(3)
    host = Host()
    for parameter in host.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    return host


def train(config: peft.LoraConfig, folder: Path, seed: int) -> None:
    """Save an adapter of which every number has moved."""
    torch.manual_seed(seed)
    tuned = peft.get_peft_model(make_host(), config)
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter)
            parameter.data.copy_(parameter * (1 + 0.2 * noise) if "magnitude" in name else 0.5 * noise)
    tuned.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Train every adapter once."""
    root = tmp_path_factory.mktemp("adapters")
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        for seed, (name, settings) in enumerate(CONFIGS.items()):
            train(peft.LoraConfig(target_modules=list(KINDS), **settings), root / name, seed)
    return {name: root / name for name in CONFIGS}


def load(folders: Mapping[str, Path], names: Sequence[str]) -> peft.PeftModel:
    """Load adapters onto a fresh base."""
    tuned = peft.PeftModel.from_pretrained(make_host(), folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        tuned.load_adapter(folders[name], adapter_name=name)
    return tuned


def read(folder: Path) -> tuple[dict, dict[str, tuners.Tensors]]:
    """Read the configuration, and the tensors by module and suffix."""
    found: dict[str, tuners.Tensors] = {}
    for key, stored in oracle.read_safetensors(folder / "adapter_model.safetensors").items():
        _, _, path, suffix = key.split(".", 3)
        if not suffix.startswith("base_layer"):
            found.setdefault(path, {})[suffix] = oracle.values(stored)
    return oracle.read_json(folder / "adapter_config.json"), found


def weights_of(model: nn.Module) -> dict[str, Array]:
    """Give each layer's weight in float64."""
    return {path: model.get_submodule(path).weight.detach().double().numpy() for path in KINDS}


# --- add_weighted_adapter: the calls ------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of add_weighted_adapter."""

    kind: str
    names: tuple[str, ...]
    weights: tuple[float, ...]
    settings: Mapping[str, Any]


def _call(kind: str, names: str, weights: tuple[float, ...], **settings: Any) -> Call:
    return Call(kind, tuple(names.split()), weights, settings)


_TWO, _MINUS, _THREE = (0.7, 1.3), (0.7, -0.4), (0.6, -1.1, 0.8)
CALLS: Mapping[str, Call] = {
    "linear": _call("linear", "x y", _TWO),
    "linear-negative": _call("linear", "x y z", _THREE),
    "linear-rslora-first": _call("linear", "root y", _MINUS),
    "linear-rslora-second": _call("linear", "y root", _MINUS),
    "one-alone-is-linear": _call("svd", "y", (-0.6,), svd_rank=2),
    "cat": _call("cat", "x thin y", _THREE),
    "cat-patterns": _call("cat", "x mixed", _MINUS),
    "cat-rslora": _call("cat", "root thin", _MINUS),
    "svd": _call("svd", "x y", _TWO),
    "svd-ranks": _call("svd", "thin x", _MINUS, svd_rank=4),
    "svd-patterns": _call("svd", "mixed x", _MINUS),
    "svd-rslora": _call("svd", "root thin", _TWO, svd_rank=2),
    "svd-clamp": _call("svd", "x y", _MINUS, svd_clamp=0.9),
    "ties": _call("ties", "x y z", _THREE, density=0.6),
    "ties-frequency": _call("ties", "x y z", _THREE, density=0.6, majority_sign_method="frequency"),
    "ties-dense": _call("ties", "x y z", (0.6, 1.1, 0.8), density=0.97),
    "ties-svd": _call("ties_svd", "x y thin", _THREE, density=0.7),
    "ties-svd-frequency": _call("ties_svd", "x y", _MINUS, density=0.7, majority_sign_method="frequency", svd_rank=4),
    "prune": _call("magnitude_prune", "x y", _MINUS, density=0.5),
    "prune-svd": _call("magnitude_prune_svd", "x thin", _TWO, density=0.5, svd_rank=4),
    "dare-linear": _call("dare_linear", "x y z", _THREE, density=0.5),
    "dare-ties": _call("dare_ties", "x y z", _THREE, density=0.6, majority_sign_method="frequency"),
    "dare-linear-svd": _call("dare_linear_svd", "x y", _MINUS, density=0.7),
    "dare-ties-svd": _call("dare_ties_svd", "x y", _TWO, density=0.7),
}


@dataclass(frozen=True)
class Solved:
    """One call of torch.linalg.svd: the matrix and what came back."""

    matrix: Array
    left: Array
    values: Array
    right: Array

    @property
    def defect(self) -> float:
        """How far the vectors are from orthonormal: exact ones lie that near, since |1 - t| <= |1 - t^2|."""
        k = len(self.values)
        grams = self.left[:, :k].T @ self.left[:, :k], self.right[:k] @ self.right[:k].T
        return float(sum(np.linalg.norm(gram - np.eye(k)) for gram in grams))

    @property
    def error(self) -> float:
        """Of what matrix near this one these are the exact factors: the distance, in Frobenius norm."""
        k = len(self.values)
        residual = np.linalg.norm((self.left[:, :k] * self.values) @ self.right[:k] - self.matrix)
        return float(residual + self.defect * self.values[0])


Record = dict[str, list[Any]]


def write_down(patch: pytest.MonkeyPatch) -> Record:
    """Write down what torch is asked and answers: singular values, and the coins of dare."""
    seen: Record = {"svd": [], "bernoulli": []}
    svd, bernoulli = torch.linalg.svd, torch.bernoulli

    def solve(matrix: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        asked = matrix.detach().double().numpy()
        answer = svd(matrix, *args, **kwargs)
        seen["svd"].append(Solved(asked, *(t.detach().double().numpy() for t in answer)))
        return answer

    def toss(chances: torch.Tensor) -> torch.Tensor:
        mask = bernoulli(chances)
        seen["bernoulli"].append(mask.double().numpy())
        return mask

    patch.setattr(torch.linalg, "svd", solve)
    patch.setattr(torch, "bernoulli", toss)
    return seen


@dataclass(frozen=True)
class Site:
    """One module of one call: what went in, what came out, and what LAPACK was asked on the way."""

    call: Call
    kind: str
    parts: tuple[Part, ...]
    options: Options
    actual: tuple[Array, Array]
    solved: Solved | None
    scale: float
    weight: Array
    merged: Array


GetSites = Callable[[str], dict[str, Site]]


@pytest.fixture(scope="module")
def get_sites(folders: Mapping[str, Path]) -> GetSites:
    """Make each call once."""
    known: dict[str, dict[str, Site]] = {}

    def get(name: str) -> dict[str, Site]:
        if name not in known:
            with pytest.MonkeyPatch.context() as patch:
                known[name] = combine_live(CALLS[name], folders, write_down(patch))
        return known[name]

    return get


def combine_live(call: Call, folders: Mapping[str, Path], record: Record) -> dict[str, Site]:
    """Let PEFT combine and merge."""
    torch.manual_seed(5)
    tuned = load(folders, call.names)
    tuned.add_weighted_adapter(list(call.names), list(call.weights), "new", combination_type=call.kind, **call.settings)
    layers = {path: tuned.base_model.model.get_submodule(path) for path in KINDS}
    actual = {path: _factors(layer) for path, layer in layers.items()}
    base, merged = weights_of(make_host()), weights_of(tuned.merge_and_unload(adapter_names=["new"]))
    files = [read(folders[name]) for name in call.names]
    settings = dict(call.settings)
    rank = rules.new_rank(call.kind, [config for config, _ in files], settings.pop("svd_rank", None))
    scale = rules.new_scale(files[0][0], rank)
    sites = {}
    for number, path in enumerate(KINDS):
        parts = tuple(_part(*file, path, w) for file, w in zip(files, call.weights, strict=True))
        options = Options(rank=rank, masks=_masks(call, record["bernoulli"], number, path), **settings)
        solved = record["svd"][number] if record["svd"] else None
        sites[path] = Site(call, KINDS[path], parts, options, actual[path], solved, scale, base[path], merged[path])
    return sites


def _factors(layer: nn.Module) -> tuple[Array, Array]:
    """Read A and B of the new adapter, kernels flattened."""
    is_embedding = "new" in layer.lora_embedding_A
    a = layer.lora_embedding_A["new"] if is_embedding else layer.lora_A["new"].weight
    b = layer.lora_embedding_B["new"] if is_embedding else layer.lora_B["new"].weight
    return a.detach().double().flatten(1).numpy(), b.detach().double().flatten(1).numpy()


def _part(config: dict, tensors: dict[str, tuners.Tensors], path: str, weight: float) -> Part:
    """Give an adapter's share in one module."""
    a, b = (next(t for suffix, t in tensors[path].items() if letter in suffix) for letter in ("_A", "_B"))
    return Part(a, b, oracle.rank_and_scale(config, path)[1], weight)


def _masks(call: Call, tossed: list[Array], number: int, path: str) -> tuple[list[Array], ...]:
    """Sort the coins: per module those of every A, then of every B; or of every delta, laid out as the weight."""
    n = len(call.names)
    if not tossed:
        return ()
    if call.kind.endswith("svd"):
        mine = tossed[number * n : (number + 1) * n]
        return ([mask.T if KINDS[path] in TURNED else mask for mask in mine],)
    mine = tossed[2 * number * n : 2 * (number + 1) * n]
    return mine[:n], mine[n:]


# --- add_weighted_adapter: the bounds -----------------------------------------------------------------------


def expected(site: Site, parts: Sequence[Part] = (), release: rules.Release = rules.NEWEST) -> tuple[Array, Array]:
    """Ask the rules, with singular vectors turned the way PEFT's are."""
    kind, parts, options = site.call.kind, parts or site.parts, site.options
    if site.solved:
        a, _ = rules.combine(kind, parts, replace(options, svd_clamp=None), release)
        options = replace(options, signs=np.where(np.sum(a * site.actual[0], axis=1) < 0, -1.0, 1.0))
    return rules.combine(kind, parts, options, release)


def bounds(site: Site) -> tuple[Array, Array, Array]:
    """Bound A, B and B A."""
    a, b = expected(site)
    if site.solved:
        return spectral_bounds(site, site.solved)
    if site.call.kind == "cat" and len(site.parts) > 1:  # w, s, and a product with each
        a_bound, b_bound = gamma(5) * np.abs(a), np.zeros(b.shape)
    else:
        for_a, for_b = rules.factor_weights(site.parts)
        families = [_flat(part.a) for part in site.parts], [_flat(part.b) for part in site.parts]
        for family, tensors in enumerate(families):  # as stored, so without error
            refuse_toss_ups(site, tensors, [np.zeros(t.shape) for t in tensors], family)
        a_bound, b_bound = (mixture_bound(site, *pair) for pair in zip(families, (for_a, for_b), strict=True))
    return a_bound, b_bound, np.abs(b) @ a_bound + b_bound @ (np.abs(a) + a_bound)


def mixture_bound(site: Site, tensors: Sequence[Array], weights: Sequence[float], before: float = 0) -> Array:
    """Bound a mixture: a weight is rounded and multiplies, n terms are summed; ties divides once, dare by a rounded
    density.  before counts the roundings of the tensors, relative to what is handed over.
    """
    most = 1 / site.options.density if site.call.kind.startswith("dare") and site.options.density else 1.0
    terms = [abs(w) * most * np.abs(t) for w, t in zip(weights, tensors, strict=True)]
    return gamma(before + len(terms) + 6) * np.sum(terms, axis=0)


def refuse_toss_ups(site: Site, tensors: Sequence[Array], errors: Sequence[Array], family: int = 0) -> None:
    """See that no choice, of an entry kept or of a sign elected, hangs on roundoff: 3 for dare's division, n for the
    sum.
    """
    kind, density = site.call.kind, site.options.density
    if len(site.parts) == 1 or ("ties" not in kind and "prune" not in kind):
        return
    assert density is not None
    if kind.startswith("dare"):
        masks = site.options.masks[family]
        tensors = [rules.drop(t, mask, density) for t, mask in zip(tensors, masks, strict=True)]
    else:
        for tensor, error in zip(tensors, errors, strict=True):
            order, kept = np.sort(np.abs(tensor), axis=None)[::-1], int(density * tensor.size)
            assert order[kept - 1] - order[kept] > 2 * error.max()
        tensors = [rules.keep_largest(tensor, density) for tensor in tensors]
    if "ties" in kind:
        sizes = np.abs(tensors)
        unsure = np.sum(errors, axis=0) / density + gamma(len(tensors) + 3) * sizes.sum(axis=0)
        clear = np.abs(np.sum(tensors, axis=0)) > unsure
        if site.options.majority_sign_method == "frequency":
            clear = np.all((sizes > np.array(errors) / density) | (sizes == 0), axis=0)
        assert np.all(clear | (sizes.sum(axis=0) == 0))


def spectral_bounds(site: Site, solved: Solved) -> tuple[Array, Array, Array]:
    """Bound the factors and the product of a truncated SVD.

    The matrix taken apart: k roundings of s B A and two of s, then the mixture.  error: from our matrix to the one
    whose exact SVD LAPACK gave.  A singular vector turns by at most 2 error over the distance to the next singular
    value, zero among them (Wedin 1972); a column of B by that times its value, and its value by error.  A clamp
    moves no more than what it clamps or than the limit, which a rounded position moves by a part in its count.
    """
    deltas = [part.delta for part in site.parts]
    sizes = [abs(part.scale) * np.abs(_flat(part.b)) @ np.abs(_flat(part.a)) for part in site.parts]
    most = max(len(part.a) for part in site.parts) + 3
    rounding = mixture_bound(site, sizes, [part.weight for part in site.parts], most)
    refuse_toss_ups(site, deltas, [gamma(most) * size for size in sizes])
    delta = rules.combined_delta(site.call.kind, site.parts, site.options)
    assert np.all(np.abs(solved.matrix - delta) <= rounding)
    error, rank = np.linalg.norm(rounding) + solved.error, site.options.rank
    values = np.append(np.linalg.svd(delta, compute_uv=False), 0.0)
    gaps = np.array([np.min(np.abs(np.delete(values, i) - values[i])) for i in range(rank)])
    turns = 2 * error / gaps + solved.defect
    a, b = expected(site)
    a_bound = np.broadcast_to(turns[:, None], a.shape)
    b_bound = np.broadcast_to((values[:rank] * (turns + U) + error), b.shape)
    if site.options.svd_clamp is None:
        truncation = error * rules.conditioning(values, rank) + solved.defect * values[0]
        return a_bound, b_bound, truncation + gamma(2) * np.abs(b) @ np.abs(a)
    limit = max(a_bound.max(), b_bound.max()) + gamma(a.size + b.size + 3) * 2 * max(values[0], 1.0)
    a_bound, b_bound = np.maximum(a_bound, limit), np.maximum(b_bound, limit)
    return a_bound, b_bound, np.abs(b) @ a_bound + b_bound @ (np.abs(a) + a_bound)


def _flat(factor: Array) -> Array:
    """Flatten a kernel."""
    return factor.reshape(len(factor), -1)


def agrees(site: Site, parts: Sequence[Part] = (), release: rules.Release = rules.NEWEST) -> bool:
    """Compare both factors."""
    pairs = zip(site.actual, expected(site, parts, release), bounds(site)[:2], strict=True)
    return all(
        actual.shape == wanted.shape and np.all(np.abs(actual - wanted) <= bound) for actual, wanted, bound in pairs
    )


# --- add_weighted_adapter: the tests ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_the_combined_factors_are_peft_s(get_sites: GetSites, name: str) -> None:
    for path, site in get_sites(name).items():
        assert agrees(site), path
        assert max(bound.max() for bound in bounds(site)[:2]) < 1e-2 * np.abs(site.actual[0]).max(), path


@pytest.mark.parametrize("name", CALLS)
def test_the_merge_of_the_combination_is_peft_s(get_sites: GetSites, name: str) -> None:
    """W + new_scale B A: r roundings of the product, two of the scale, one of the sum."""
    for path, site in get_sites(name).items():
        a, b = expected(site)
        rounding = gamma(len(a) + 4) * (np.abs(site.weight) + _laid_out(site, site.scale * np.abs(b) @ np.abs(a)))
        bound = rounding + _laid_out(site, site.scale * bounds(site)[2])
        assert np.all(np.abs(site.merged - site.weight - _laid_out(site, site.scale * b @ a)) <= bound), path
        assert not np.all(np.abs(site.merged - site.weight - _laid_out(site, 2 * site.scale * b @ a)) <= bound), path


def _laid_out(site: Site, matrix: Array) -> Array:
    """Lay an (out, in) matrix out as the weight."""
    return (matrix.T if site.kind in TURNED else matrix).reshape(site.weight.shape)


@pytest.mark.parametrize("name", CALLS)
def test_twice_a_scale_shows(get_sites: GetSites, name: str) -> None:
    for path, site in get_sites(name).items():
        for i in range(len(site.parts)):
            parts = [replace(part, scale=part.scale * (2 if i == j else 1)) for j, part in enumerate(site.parts)]
            assert not agrees(site, parts), (path, i)


@pytest.mark.parametrize("name", CALLS)
def test_one_number_of_a_factor_shows(get_sites: GetSites, name: str) -> None:
    """Change the greatest entry that is neither dropped nor outvoted."""
    for path, site in get_sites(name).items():
        first = site.parts[0]
        changed = first.b.copy()
        live = np.abs(changed) * (site.options.masks[1][0] if len(site.options.masks) == 2 else 1)
        changed.flat[np.argmax(live)] *= 1.05
        assert not agrees(site, (replace(first, b=changed), *site.parts[1:])), path


ANOTHER_RELEASE = {
    "linear": (0, 8),
    "linear-negative": (0, 18),
    "ties": (0, 18),
    "svd": (0, 20),
    "ties-svd": (0, 9),
    "dare-linear": (0, 18),
    "dare-linear-svd": (0, 18),
}
SAME_RELEASE = {"linear": (0, 9), "linear-negative": (0, 19), "cat": (0, 6), "svd": (0, 8), "dare-ties": (0, 19)}


@pytest.mark.parametrize("name", ANOTHER_RELEASE)
def test_the_rule_of_another_release_shows(get_sites: GetSites, name: str) -> None:
    for path, site in get_sites(name).items():
        assert not agrees(site, release=ANOTHER_RELEASE[name]), path


@pytest.mark.parametrize("name", SAME_RELEASE)
def test_where_releases_agree_so_do_the_rules(get_sites: GetSites, name: str) -> None:
    for path, site in get_sites(name).items():
        assert agrees(site, release=SAME_RELEASE[name]), path


def test_weights_of_the_factors_by_release() -> None:
    """sqrt(2 * 8) = 4 and sqrt(9 * 1) = 3, worked out on paper."""
    one = np.ones((1, 1))
    plus, minus = Part(one, one, 8.0, 2.0), Part(one, one, 1.0, -9.0)
    assert rules.factor_weights((plus, minus), (0, 6)) == ([16.0, -9.0], [1.0, 1.0])
    assert rules.factor_weights((Part(one, one, 8.0, 4.0),), (0, 8)) == ([16.0], [2.0])
    assert rules.factor_weights((plus,), (0, 9)) == ([4.0], [4.0])
    assert rules.factor_weights((plus, minus), (0, 18)) == ([4.0, -3.0], [4.0, -3.0])
    assert rules.factor_weights((plus, minus), (0, 19)) == ([4.0, -3.0], [4.0, 3.0])
    for release in ((0, 7), (0, 9), (0, 17)):
        with pytest.raises(ValueError, match="root of a negative"):
            rules.factor_weights((plus, minus), release)


def test_ties_on_paper() -> None:
    """The smallest of each four goes, the sign is elected unweighted, and those who agree are averaged."""
    stack = [np.array([[4.0, -3.0, 2.0, 1.0]]), np.array([[-2.0, 5.0, -6.0, 1.0]]), np.array([[-1.0, 4.0, 5.0, 2.0]])]
    weights = (1.0, 10.0, 100.0)
    # kept: 4 -3 2 0, -2 5 -6 0, 0 4 5 2; of sums 2, 6, 1, 2 every sign is plus
    made = rules.mix("ties", stack, weights, Options(density=0.75))
    assert made.tolist() == [[4.0, (50.0 + 400.0) / 2, (2.0 + 500.0) / 2, 200.0]]
    # without the cut the first column has one plus and two minus, but still the sum 1
    assert rules.mix("ties", stack, weights, Options(density=1.0)).tolist()[0][0] == 4.0
    frequent = Options(density=1.0, majority_sign_method="frequency")
    assert rules.mix("ties", stack, weights, frequent).tolist()[0][0] == (-20.0 - 100.0) / 2
    assert rules.elected_signs(np.zeros((2, 1)), "total").tolist() == [1.0]


def test_what_cannot_be_said_is_refused() -> None:
    part = Part(np.ones((2, 3)), np.ones((4, 2)), 1.0, 1.0)
    other = Part(np.ones((3, 3)), np.ones((4, 3)), 1.0, 1.0)
    calls = (
        ("linear", (part, other), Options(), rules.NEWEST),  # ranks differ
        ("ties", (part, part), Options(), rules.NEWEST),  # no density
        ("ties", (part, part), Options(density=0.5), rules.NEWEST),  # equal entries at the cut
        ("ties", (part, part), Options(density=0.5), (0, 8)),  # not there yet
        ("dare_linear", (part, part), Options(density=0.5), rules.NEWEST),  # no masks
        ("svd", (part, part), Options(rank=4), rules.NEWEST),  # wider than the matrix
        ("svd", (part, part), Options(rank=1, svd_clamp=0.9), rules.NEWEST),  # no signs
        ("mean", (part, part), Options(), rules.NEWEST),
    )
    for kind, parts, options, release in calls:
        with pytest.raises(ValueError, match=r"\w"):
            rules.combine(kind, parts, options, release)
    with pytest.raises(ValueError, match="ranks"):
        rules.new_rank("linear", [{"r": 2}, {"r": 3}])


# --- two DoRA adapters --------------------------------------------------------------------------------------


Known = tuple[Array, Array]  # a value and the bound on its error


def _moved(base: Known, delta: Known) -> Known:
    """One sum."""
    total = base[0] + delta[0]
    return total, base[1] + delta[1] + U * np.abs(total)


def _norm_error(moved: Known, kind: str) -> Array:
    """Relative: of each element, and N squares, N - 1 sums and a root, which halves."""
    norm = oracle.lengths(moved[0], kind)
    return oracle.lengths(moved[1], kind) / norm + gamma(moved[0].size / norm.size / 2 + 2)


def _rescaled(moved: Known, magnitude: Array, of: Known, kind: str) -> tuple[Known, Array, Array]:
    """m V / |of|: a division, a product, a store.  Give it, its factor, and the factor's relative error."""
    factor = magnitude.reshape(oracle.lengths(of[0], kind).shape) / oracle.lengths(of[0], kind)
    loose = _norm_error(of, kind) + 2 * U
    made = factor * moved[0]
    return (made, np.abs(factor) * moved[1] * (1 + loose) + np.abs(made) * (loose + 2 * U)), factor, loose


def dora_bound(
    weight: Array, deltas: Sequence[Known], magnitudes: Sequence[Array], kind: str, *, staged: bool
) -> Array:
    """Carry the error through PEFT 0.21: merge x, take it out again for the norm of y, merge it anew, merge y.

    What is taken out, W1 / f - D, has the errors of W1, of f, and of one sum, and comes back as the base.  In stages
    the second merge starts from the first.
    """
    moved = _moved((weight, np.zeros(weight.shape)), deltas[0])
    first, factor, loose = _rescaled(moved, magnitudes[0], moved, kind)
    if staged:
        last = _moved(first, deltas[1])
        return _rescaled(last, magnitudes[1], last, kind)[0][1]
    error = first[1] / np.abs(factor) + np.abs(moved[0]) * (loose + 2 * U) + deltas[0][1] + U * np.abs(weight)
    rebuilt = (weight, error)
    moved = _moved(rebuilt, deltas[0])
    again, _, _ = _rescaled(moved, magnitudes[0], moved, kind)
    return _rescaled(_moved(again, deltas[1]), magnitudes[1], _moved(rebuilt, deltas[1]), kind)[0][1]


def _known_delta(tensors: tuners.Tensors, config: dict, path: str) -> tuple[Known, Array]:
    """s B A with r + 3 roundings, and the magnitude."""
    rank, scale = oracle.rank_and_scale(config, path)
    a, b, magnitude = (next(t for suffix, t in tensors.items() if word in suffix) for word in ("_A", "_B", "magnitude"))
    delta, size = (oracle.DELTAS[KINDS[path]](*factors, scale) for factors in ((a, b), (np.abs(a), np.abs(b))))
    return (delta, gamma(rank + 3) * size), magnitude


@dataclass(frozen=True)
class Twice:
    """One weight that two DoRA adapters were merged into, in one call or in two."""

    path: str
    base: Array
    adapters: list[tuple[tuners.Tensors, dict]]
    actual: Array
    staged: bool

    @property
    def bound(self) -> Array:
        """What roundoff can do."""
        known = [_known_delta(*adapter, self.path) for adapter in self.adapters]
        deltas, magnitudes = zip(*known, strict=True)
        return dora_bound(self.base, deltas, magnitudes, KINDS[self.path], staged=self.staged)

    def agrees(self, adapters: list[tuple[tuners.Tensors, dict]], release: rules.Release) -> bool:
        """Ask the rule of a release."""
        made = tuners.dora_in_turn(adapters, self.base, path=self.path, kind=KINDS[self.path], release=release)
        return bool(np.all(np.abs(self.actual - made) <= self.bound))


def merge_twice(folders: Mapping[str, Path], path: str, *, staged: bool) -> Twice:
    """Let PEFT merge."""
    names = ["dora", "dora2"]
    if staged:
        model = load(folders, names[:1]).merge_and_unload()
        merged = peft.PeftModel.from_pretrained(model, folders[names[1]]).merge_and_unload()
    else:
        merged = load(folders, names).merge_and_unload(adapter_names=names)
    files = [read(folders[name]) for name in names]
    adapters = [(tensors[path], config) for config, tensors in files]
    return Twice(path, weights_of(make_host())[path], adapters, weights_of(merged)[path], staged)


@pytest.mark.parametrize("path", KINDS)
def test_two_dora_adapters_in_one_call(folders: Mapping[str, Path], path: str) -> None:
    made = merge_twice(folders, path, staged=False)
    assert made.agrees(made.adapters, (0, 21))
    assert made.bound.max() < 1e-2 * np.abs(made.actual - made.base).max()
    assert not made.agrees(made.adapters, (0, 20))
    assert not made.agrees(made.adapters[::-1], (0, 21))


@pytest.mark.parametrize("path", [path for path in KINDS if path != "emb"])  # its file carries the base along
def test_two_dora_adapters_one_after_the_other(folders: Mapping[str, Path], path: str) -> None:
    """What releases up to 0.20 did in one call, every release does in two."""
    made = merge_twice(folders, path, staged=True)
    assert made.agrees(made.adapters, (0, 20))
    assert not made.agrees(made.adapters, (0, 21))


@pytest.mark.parametrize("path", KINDS)
def test_any_change_of_a_dora_adapter_shows(folders: Mapping[str, Path], path: str) -> None:
    made = merge_twice(folders, path, staged=False)
    for number, (tensors, config) in enumerate(made.adapters):
        others = [(tensors, {**config, "lora_alpha": 2 * config["lora_alpha"]})]
        for suffix, tensor in tensors.items():
            changed = tensor.copy()
            changed.flat[tensor.size // 2] += 0.05 * np.abs(tensor).max()
            others.append(({**tensors, suffix: changed}, config))
        for other in others:
            assert not made.agrees([*made.adapters[:number], other, *made.adapters[number + 1 :]], (0, 21))


def test_a_second_dora_adapter_before_0_12_is_refused(folders: Mapping[str, Path]) -> None:
    made = merge_twice(folders, "lin", staged=True)
    with pytest.raises(ValueError, match="second DoRA"):
        made.agrees(made.adapters, (0, 11))


# --- bases that PEFT takes apart ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """One PiSSA or OLoRA adapter, merged: the weight before and after, and what LAPACK said of it."""

    path: str
    config: dict
    tensors: tuners.Tensors
    base: Array
    actual: Array
    answers: tuple[Array, ...]

    def agrees(self, tensors: tuners.Tensors, config: dict) -> bool:
        """Ask the formula."""
        made, _ = tuners.residual_lora(tensors, config, self.base, None, path=self.path, kind=KINDS[self.path])
        return bool(np.all(np.abs(self.actual - made) <= self.bound))

    @property
    def bound(self) -> Array:
        """The part taken out, its product and difference, then r + 3 roundings for s B A and one for the sum."""
        rank, scale = oracle.rank_and_scale(self.config, self.path)
        sizes = [np.abs(t) for t in (self.tensors["lora_A.weight"], self.tensors["lora_B.weight"])]
        taken = pissa_bound if len(self.answers) == 3 else olora_bound
        matrix = self.base.T if KINDS[self.path] in TURNED else self.base
        error, size = taken(matrix, self.answers, rank, scale)
        # two for sqrt(S / s) and its product in each factor, one for the scale, r for the product, one difference
        error = error + gamma(rank + 8) * (size + np.abs(matrix))
        error = error.T if KINDS[self.path] in TURNED else error
        residual = np.abs(self.base) + (size.T if KINDS[self.path] in TURNED else size)
        return error + gamma(rank + 5) * (residual + oracle.DELTAS[KINDS[self.path]](*sizes, scale))


def pissa_bound(matrix: Array, answers: tuple[Array, ...], rank: int, scale: float) -> tuple[Array, Array]:
    """Bound U_r S_r V_r^T by how well the SVD is conditioned, and measure its terms."""
    solved = Solved(matrix, *answers)
    error = solved.error * rules.conditioning(solved.values, rank) + solved.defect * solved.values[0]
    left, right = np.abs(solved.left[:, :rank]), np.abs(solved.right[:rank])
    return np.full(matrix.shape, error), (left * solved.values[:rank]) @ right


def olora_bound(matrix: Array, answers: tuple[Array, ...], rank: int, scale: float) -> tuple[Array, Array]:
    """Bound s P W, P projecting on r columns: P turns by their error over their least singular value (Wedin 1973)."""
    q, r = answers
    defect = np.linalg.norm(q.T @ q - np.eye(q.shape[1]))
    size = np.linalg.norm(matrix)
    error = np.linalg.norm(q @ r - matrix) + defect * size
    turned = error / np.linalg.svd(matrix[:, :rank], compute_uv=False)[-1]
    return np.full(matrix.shape, scale * (turned * size + error + defect * size)), scale * np.abs(q[:, :rank]) @ np.abs(
        r[:rank]
    )


TAKEN = [("pissa", "lin"), ("pissa", "gpt"), ("olora", "lin")]


@pytest.fixture(params=TAKEN, ids="-".join)
def taken(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Taken:
    """Train, load and merge, and keep the last answer LAPACK gave."""
    how, path = request.param
    train(peft.LoraConfig(target_modules=[path], r=2, lora_alpha=5, init_lora_weights=how), tmp_path, 17)
    name, answers = {"pissa": "svd", "olora": "qr"}[how], []
    solve = getattr(torch.linalg, name)

    def listen(*args: Any, **kwargs: Any) -> Any:
        answer = solve(*args, **kwargs)
        answers.append(tuple(t.double().numpy() for t in answer))  # a copy: PEFT divides S by s in place
        return answer

    monkeypatch.setattr(torch.linalg, name, listen)
    merged = peft.PeftModel.from_pretrained(make_host(), tmp_path).merge_and_unload()
    config, tensors = read(tmp_path)
    return Taken(path, config, tensors[path], weights_of(make_host())[path], weights_of(merged)[path], answers[-1])


def test_the_residual_base_is_peft_s(taken: Taken) -> None:
    assert taken.agrees(taken.tensors, taken.config)
    assert taken.bound.max() < 1e-3 * np.abs(taken.actual - taken.base).max()


def test_any_change_of_a_residual_adapter_shows(taken: Taken) -> None:
    assert not taken.agrees(taken.tensors, {**taken.config, "lora_alpha": 10})
    other = {"pissa": "olora", "olora": "pissa"}[taken.config["init_lora_weights"]]
    if KINDS[taken.path] == "linear":
        assert not taken.agrees(taken.tensors, {**taken.config, "init_lora_weights": other})
    for suffix, tensor in taken.tensors.items():
        changed = tensor.copy()
        changed.flat[tensor.size // 2] += 0.01 * np.abs(tensor).max()
        assert not taken.agrees({**taken.tensors, suffix: changed}, taken.config), suffix


def test_what_has_no_residual_base_is_refused(taken: Taken) -> None:
    for config, kind in (
        ({**taken.config, "init_lora_weights": "pissa_niter_4"}, "linear"),
        ({**taken.config, "init_lora_weights": True}, "linear"),
        ({**taken.config, "init_lora_weights": "olora"}, "conv1d_t"),
        ({**taken.config, "init_lora_weights": "pissa"}, "embedding"),
    ):
        with pytest.raises(ValueError, match="of a"):
            tuners.residual_base(taken.base, config, path=taken.path, kind=kind)

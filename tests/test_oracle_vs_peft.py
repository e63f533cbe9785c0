"""Hold the NumPy oracle against merges that PEFT itself made.

Neither side shares code with the other: PEFT computes with torch and writes files, the oracle reads the
files by hand and computes in float64.  The only allowance is what rounding can do, derived below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import oracle
import peft_worlds
import pytest
import torch
from peft_worlds import World

torch.set_num_threads(1)

U = 2.0**-24  # unit roundoff of the fp32 that PEFT computes in on a CPU

CASES = peft_worlds.cases()
ONE_EACH = [(name, recipe.dtypes[0], False) for name, recipe in peft_worlds.RECIPES.items()]
HALF = [case for case in CASES if case[1] != "fp32"]


@dataclass
class Case:
    """Hold one world's files, read."""

    world: World
    dtype: str
    safe: bool
    base: oracle.Tensors
    adapters: list[oracle.Adapter]
    merged: dict[str, oracle.Stored]

    @property
    def options(self) -> dict[str, object]:
        """Say what the oracle must know besides the tensors."""
        rounds = self.world.name in ("low-cpu-mem", "no-autocast") and self.dtype != "fp32"
        return {"tied": dict(self.world.tied), "round_factors": self.dtype if rounds else None}

    @property
    def deltas_are_rounded(self) -> bool:
        """Say whether PEFT rounds each delta to the base's dtype before it adds it, whatever the layer."""
        return self.dtype != "fp32" and (self.safe or self.world.name == "no-autocast")


GetCase = Callable[[str, str, bool], Case]


# --- reading --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def get_case(tmp_path_factory: pytest.TempPathFactory) -> GetCase:
    """Build and read each world once."""
    root = tmp_path_factory.mktemp("worlds")
    known: dict[tuple[str, str, bool], Case] = {}

    def get(name: str, dtype: str, safe: bool) -> Case:
        key = (name, dtype, safe)
        if key not in known:
            known[key] = _read_case(peft_worlds.build(name, root, dtype, safe), dtype, safe)
        return known[key]

    return get


def _read_case(world: World, dtype: str, safe: bool) -> Case:
    """Read base, adapters and merged; the base as the model holds it, in the merged dtype."""
    base = {
        world.base_prefix + name: _loaded(stored, dtype)
        for name, stored in _read_folder(world.base_dir, "model").items()
    }
    adapters = [
        (
            oracle.read_json(folder / "adapter_config.json"),
            {key: oracle.values(stored) for key, stored in _read_folder(folder, "adapter_model").items()},
        )
        for folder in world.adapter_dirs
    ]
    merged = _read_folder(world.merged[dtype, safe], "model")
    return Case(world, dtype, safe, base, adapters, merged)


def _loaded(stored: oracle.Stored, dtype: str) -> np.ndarray:
    """Turn a stored base tensor into what a model loaded in dtype holds."""
    values = oracle.values(stored)
    return oracle.round_to(values, dtype) if stored[0] in oracle.FORMATS else values


def _read_folder(folder: Path, stem: str) -> dict[str, oracle.Stored]:
    """Read whichever of the four layouts is there."""
    if (folder / f"{stem}.safetensors").exists():
        return oracle.read_safetensors(folder / f"{stem}.safetensors")
    if (folder / f"{stem}.safetensors.index.json").exists():
        return oracle.read_index(folder / f"{stem}.safetensors.index.json")
    found: dict[str, oracle.Stored] = {}
    for path in sorted(folder.glob("*.bin")):
        state = torch.load(path, weights_only=True)
        found.update({name: _from_torch(tensor) for name, tensor in state.items()})
    if not found:
        raise FileNotFoundError(f"no {stem} in {folder}")
    return found


def _from_torch(tensor: torch.Tensor) -> oracle.Stored:
    """Turn a torch tensor into its bit patterns."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    width = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return names[tensor.dtype], tensor.contiguous().view(width).numpy().view(f"u{tensor.element_size()}")


# --- the budget -----------------------------------------------------------------------------------------


def _largest_rank(case: Case) -> int:
    """Find the longest inner product of any delta."""
    return max(t.shape[0] for _, tensors in case.adapters for key, t in tensors.items() if _role(key) == "A")


def _role(key: str) -> str:
    return oracle.parse_key(key)[1]


def _without_magnitudes(adapters: list[oracle.Adapter]) -> list[oracle.Adapter]:
    """Take DoRA out of DoRA."""
    return [(config, {key: t for key, t in tensors.items() if _role(key) != "m"}) for config, tensors in adapters]


def _without_deltas(adapters: list[oracle.Adapter]) -> list[oracle.Adapter]:
    """Set every B to zero, so that only what replaces base tensors is left."""
    return [
        (config, {key: t * (0 if _role(key).startswith("B") else 1) for key, t in tensors.items()})
        for config, tensors in _without_magnitudes(adapters)
    ]


def _expected(case: Case, adapters: list[oracle.Adapter]) -> oracle.Tensors:
    return oracle.expected_checkpoint(case.base, adapters, dict(case.world.kinds), **case.options)


def _sizes(case: Case) -> oracle.Tensors:
    """Give |W| + |s| |B| |A|: the oracle itself, on absolute values and without magnitudes."""
    adapters = [(config, {key: np.abs(t) for key, t in tensors.items()}) for config, tensors in case.adapters]
    base = {name: np.abs(t) for name, t in case.base.items()}
    return _expected(replace(case, base=base), _without_magnitudes(adapters))


def _additions(case: Case) -> dict[str, int]:
    """Count how often PEFT adds something to each tensor."""
    counts: dict[str, int] = {}
    kinds, tied = dict(case.world.kinds), dict(case.world.tied)
    for _, tensors in case.adapters:
        for path, roles in oracle.parse(tensors)[0].items():
            if "A" not in roles:
                continue
            name = oracle.weight_name(path, kinds, tied)
            counts[name] = counts.get(name, 0) + (2 if oracle.kind_of(path, kinds) == "mha_out" else 1)
            if "B.bias" in roles:
                counts[f"{path}.bias"] = counts.get(f"{path}.bias", 0) + 1
    return counts


def _kind_by_tensor(case: Case) -> dict[str, str]:
    """Give the kind of the layer behind each weight that takes a delta."""
    kinds, tied = dict(case.world.kinds), dict(case.world.tied)
    paths = [path for _, tensors in case.adapters for path in oracle.parse(tensors)[0]]
    return {oracle.weight_name(path, kinds, tied): oracle.kind_of(path, kinds) for path in paths}


def budgets(case: Case, expected: oracle.Tensors) -> oracle.Tensors:
    """Bound, per element, how far an honest merge can be from expected.

    In fp32: k roundings of the inner product, two of the scaling (the scalar itself and the product) and one
    of the sum, each at most U of what stands there, so (k + 3) U (|W| + |s| |B| |A|); each further addition
    to the same tensor costs one more.  In a narrower dtype each addition rounds once more, by half an ulp,
    and so does each delta that is rounded before it is added.
    """
    k, sizes, additions, kind = _largest_rank(case), _sizes(case), _additions(case), _kind_by_tensor(case)
    plain = _expected(case, _without_magnitudes(case.adapters))
    start = _expected(case, _without_deltas(case.adapters))
    found: oracle.Tensors = {}
    for name, times in additions.items():
        bound = (k + 2 + times) * U * sizes[name]
        if name.endswith("weight") and _has_magnitude(case):
            bound = _dora_budget(bound, plain[name], expected[name], kind[name])
        if case.dtype != "fp32":
            deltas = sizes[name] - np.abs(start[name]) if _is_delta_rounded(case, name) else None
            bound = bound + _storage_budget(case.dtype, expected[name], bound, times, sizes[name], deltas)
        found[name] = bound
    return found


def _is_delta_rounded(case: Case, name: str) -> bool:
    """Say whether PEFT stores a delta in the base's dtype: never a bias's, never DoRA's, always an
    embedding's or an attention's.
    """
    if name.endswith("bias") or _has_magnitude(case):
        return False
    return case.deltas_are_rounded or _kind_by_tensor(case)[name] in ("embedding", "mha", "mha_out")


def _has_magnitude(case: Case) -> bool:
    return any(_role(key) == "m" for _, tensors in case.adapters for key in tensors)


def _dora_budget(bound: np.ndarray, moved: np.ndarray, expected: np.ndarray, kind: str) -> np.ndarray:
    """Bound m V / |V| from the bound on V = W + delta.

    The length of V inherits the bounds of its elements and rounds N squares, N - 1 sums and one root (a root
    halves relative errors); then one division, one product and one store.
    """
    length = oracle.lengths(moved, kind)
    count = moved.size // length.size
    length_error = oracle.lengths(bound, kind) / length + (count / 2 + 1) * U
    factor = np.abs(expected) / np.where(moved == 0, 1, np.abs(moved))
    return factor * bound * (1 + length_error) + np.abs(expected) * (length_error + 3 * U)


def _storage_budget(
    dtype: str,
    expected: np.ndarray,
    error: np.ndarray,
    times: int,
    size: np.ndarray,
    deltas: np.ndarray | None,
) -> np.ndarray:
    """Add half an ulp for every store: of the sums, and of the deltas where those are rounded too."""
    largest = np.abs(expected) + error if times == 1 else size
    store = oracle.ulp(largest, dtype) / 2
    if deltas is None:
        return times * store
    delta_store = oracle.ulp(deltas, dtype) / 2
    return times * (oracle.ulp(largest + delta_store, dtype) / 2 + delta_store)


# --- the comparison -------------------------------------------------------------------------------------


def disagreements(case: Case) -> list[str]:
    """Name every tensor of the merged file that is not what the oracle says."""
    expected = _expected(case, case.adapters)
    bounds = budgets(case, expected)
    found = sorted(set(expected) ^ set(case.merged))
    for name in sorted(set(expected) & set(case.merged)):
        dtype, bits = case.merged[name]
        actual = oracle.values((dtype, bits))
        if actual.shape != expected[name].shape or dtype != _dtype_of(case, name):
            found.append(name)
        elif name in bounds:
            found += [name] if not np.all(np.abs(actual - expected[name]) <= bounds[name]) else []
        elif not _identical(actual, _stored_as(expected[name], dtype)):
            found.append(name)
    return found


def _dtype_of(case: Case, name: str) -> str:
    """Say in which dtype a tensor of the merged file must be."""
    if case.world.name == "low-cpu-mem" and name == "lm_head.weight":
        return "fp32"  # a low-memory load keeps the dtype of the adapter file
    return "I64" if name.endswith("num_batches_tracked") else case.dtype


def _stored_as(expected: np.ndarray, dtype: str) -> np.ndarray:
    return oracle.round_to(expected, dtype) if dtype in oracle.FORMATS else expected


def _identical(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Compare bit for bit: float64 holds every stored number, so only the sign of zero is left to ask."""
    same_sign = np.array_equal(np.signbit(actual), np.signbit(expected))
    return bool(np.array_equal(actual, expected) and same_sign)


def _ident(case: tuple[str, str, bool]) -> str:
    return f"{case[0]}-{case[1]}-{'safe' if case[2] else 'plain'}"


@pytest.mark.parametrize("key", CASES, ids=_ident)
def test_oracle_agrees_with_peft(get_case: GetCase, key: tuple[str, str, bool]) -> None:
    assert disagreements(get_case(*key)) == []


@pytest.mark.parametrize("key", [key for key in CASES if key[2]], ids=_ident)
def test_every_world_changes_what_it_should(get_case: GetCase, key: tuple[str, str, bool]) -> None:
    """Guard against a world that tests nothing: each delta is 2 to 8 % of its weight."""
    case = get_case(*key)
    names = oracle.touched(case.adapters, dict(case.world.kinds), dict(case.world.tied))
    assert names
    start = _expected(case, _without_deltas(case.adapters))
    plain = _expected(case, _without_magnitudes(case.adapters))
    for name in names:
        share = np.linalg.norm(plain[name] - start[name]) / np.linalg.norm(start[name])
        assert 0.02 < share < 0.08 or name.endswith("bias"), (name, share)
        assert not _identical(oracle.values(case.merged[name]), case.base[name])


# --- which rounding PEFT uses ---------------------------------------------------------------------------


# two additions to one tensor inside one adapter, which _replay does not take apart
TWICE = ("mha", "llama-tied-both", "llama-tied-carried")


@pytest.mark.parametrize("key", [key for key in HALF if key[0] not in TWICE], ids=_ident)
def test_the_order_of_roundings_is_peft_s(get_case: GetCase, key: tuple[str, str, bool]) -> None:
    """Replay round(W + delta), or round(W + round(delta)); float64 in place of fp32 may flip few elements."""
    case = get_case(*key)
    names = oracle.touched(case.adapters, dict(case.world.kinds), dict(case.world.tied))
    replayed = _replay(case)
    wrong = sum(int(np.sum(replayed[name] != oracle.values(case.merged[name]))) for name in names)
    assert wrong <= 1 + sum(replayed[name].size for name in names) // 1000


def _replay(case: Case) -> oracle.Tensors:
    """Round where PEFT rounds, adapter by adapter, from float64 deltas."""
    held = case.base
    for adapter in case.adapters:
        step = replace(case, base=held)
        start, end = _expected(step, _without_deltas([adapter])), _expected(step, [adapter])
        start = {name: _stored_as(start[name], _dtype_of(case, name)) for name in start}
        deltas = {name: end[name] - start[name] for name in start if name in _additions(case)}
        for name in deltas:
            if _is_delta_rounded(case, name):
                deltas[name] = oracle.round_to(deltas[name], case.dtype)
        held = {name: start[name] + deltas.get(name, 0) for name in start}
        held = {name: _stored_as(held[name], _dtype_of(case, name)) for name in held}
    return held


# --- can these tests fail? ------------------------------------------------------------------------------


def _rescaled(case: Case, factor: float) -> Case:
    """Multiply every alpha."""
    adapters = []
    for config, tensors in case.adapters:
        pattern = {key: alpha * factor for key, alpha in (config["alpha_pattern"] or {}).items()}
        config = {**config, "lora_alpha": config["lora_alpha"] * factor, "alpha_pattern": pattern}
        adapters.append((config, tensors))
    return replace(case, adapters=adapters)


@pytest.mark.parametrize("key", ONE_EACH, ids=_ident)
def test_a_wrong_scale_shows_in_every_target(get_case: GetCase, key: tuple[str, str, bool]) -> None:
    case = get_case(*key)
    names = oracle.touched(case.adapters, dict(case.world.kinds), dict(case.world.tied))
    factor = 1.001 if key[1] == "fp32" else 1.5
    assert set(disagreements(_rescaled(case, factor))) == names


@pytest.mark.parametrize("key", HALF, ids=_ident)
def test_a_dropped_scale_shows_in_half_precision(get_case: GetCase, key: tuple[str, str, bool]) -> None:
    case = get_case(*key)
    assert disagreements(_rescaled(case, 0.0))
    assert disagreements(_rescaled(case, 2.0))


# carried-base: a wrapped module's tensor without base_layer; tied: the head's copy is loaded last and wins
IGNORED_BY_PEFT = {
    ("carried-base", "base_model.model.model.layers.0.self_attn.v_proj.weight"),
    ("llama-tied-both", "base_model.model.model.embed_tokens.base_layer.weight"),
    ("llama-tied-carried", "base_model.model.model.embed_tokens.base_layer.weight"),
}


@pytest.mark.parametrize("key", [key for key in ONE_EACH if key[1] == "fp32"], ids=_ident)
def test_every_adapter_tensor_counts(get_case: GetCase, key: tuple[str, str, bool]) -> None:
    """Change one adapter tensor by a thousandth, and something must disagree."""
    case = get_case(*key)
    for number, (config, tensors) in enumerate(case.adapters):
        for name in tensors:
            changed = list(case.adapters)
            changed[number] = (config, {**tensors, name: tensors[name] * 1.001})
            seen = bool(disagreements(replace(case, adapters=changed)))
            assert seen != ((key[0], name) in IGNORED_BY_PEFT), name


def _beyond(case: Case, name: str, how_far: float) -> Case:
    """Move one element of a merged tensor to the first stored number past how_far budgets."""
    expected = _expected(case, case.adapters)
    bound = budgets(case, expected)[name]
    dtype = case.merged[name][0]
    values = oracle.values(case.merged[name]).copy()
    spot = np.unravel_index(np.argmax(np.abs(expected[name])), values.shape)
    step = oracle.ulp(expected[name][spot], dtype)
    values[spot] = oracle.round_to(expected[name][spot] + how_far * bound[spot], dtype)
    while how_far >= 1 and values[spot] - expected[name][spot] <= bound[spot]:
        values[spot] += step
    merged = {**case.merged, name: ("fp64", values.view("<u8"))}
    return replace(case, merged=merged)


@pytest.mark.parametrize("key", CASES, ids=_ident)
def test_one_element_one_step_beyond_the_budget_shows(get_case: GetCase, key: tuple[str, str, bool]) -> None:
    case = get_case(*key)
    for name in sorted(budgets(case, _expected(case, case.adapters))):
        assert _out_of_budget(_beyond(case, name, 1.0)) == [name]
        assert _out_of_budget(_beyond(case, name, 0.0)) == []


def _out_of_budget(case: Case) -> list[str]:
    """Compare only the tensors that have a budget, whatever dtype they are held in."""
    expected = _expected(case, case.adapters)
    return [
        name
        for name, bound in budgets(case, expected).items()
        if not np.all(np.abs(oracle.values(case.merged[name]) - expected[name]) <= bound)
    ]


@pytest.mark.parametrize("key", ONE_EACH, ids=_ident)
def test_one_flipped_bit_in_a_bystander_shows(get_case: GetCase, key: tuple[str, str, bool]) -> None:
    case = get_case(*key)
    names = oracle.touched(case.adapters, dict(case.world.kinds), dict(case.world.tied))
    for name in sorted(set(case.merged) - names):
        dtype, bits = case.merged[name]
        flipped = bits.copy()
        flipped.flat[-1] ^= flipped.dtype.type(1)
        assert disagreements(replace(case, merged={**case.merged, name: (dtype, flipped)})) == [name]
    extra = {**case.merged, "nobody.weight": ("fp32", np.zeros(1, np.uint32))}
    assert disagreements(replace(case, merged=extra)) == ["nobody.weight"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_transposed_delta_shows_in_a_square_layer(get_case: GetCase, dtype: str) -> None:
    case = get_case("square", dtype, False)
    ((config, tensors),) = case.adapters
    swapped = {
        key: tensors[key.replace("lora_A", "lora_X").replace("lora_B", "lora_A").replace("lora_X", "lora_B")].T
        for key in tensors
    }
    wrong = replace(case, adapters=[(config, swapped)])
    assert disagreements(wrong) == ["fc0.weight", "fc1.weight"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_out_proj_with_a_single_delta_shows(get_case: GetCase, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(oracle.DELTAS, "mha_out", oracle.delta_linear)
    assert disagreements(get_case("mha", dtype, False)) == ["mha.out_proj.weight"]


def test_a_conv1d_read_as_linear_shows_where_it_is_square(get_case: GetCase) -> None:
    case = get_case("gpt2", "fp32", False)
    kinds = dict(case.world.kinds)
    square = [path for path in kinds if path.endswith("attn.c_proj")]
    kinds.update(dict.fromkeys(square, "linear"))
    wrong = replace(case, world=replace(case.world, kinds=kinds))
    assert disagreements(wrong) == sorted(f"{path}.weight" for path in square)


@pytest.mark.parametrize("name", ["llama-dora", "gpt2-dora", "embedding-dora", "conv-dora"])
def test_dora_without_its_magnitude_shows(get_case: GetCase, name: str) -> None:
    case = get_case(name, "fp32", False)
    names = oracle.touched(case.adapters, dict(case.world.kinds))
    expected = _expected(case, _without_magnitudes(case.adapters))
    assert names
    for tensor in names:
        assert not np.allclose(expected[tensor], oracle.values(case.merged[tensor]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["llama-patterns", "llama-patterns-unsorted"])
def test_the_other_pattern_order_shows(get_case: GetCase, name: str) -> None:
    case = get_case(name, "fp32", False)
    ((config, tensors),) = case.adapters
    turned = {**config, "alpha_pattern": dict(reversed(config["alpha_pattern"].items()))}
    wrong = replace(case, adapters=[(turned, tensors)])
    assert disagreements(wrong) == ["model.layers.1.self_attn.v_proj.weight"]


def test_the_other_order_of_two_adapters_shows_in_bf16(get_case: GetCase) -> None:
    """A sum has no order, but rounding in between gives it one."""
    case = get_case("llama-two-adapters", "bf16", False)
    shared = "model.layers.0.self_attn.q_proj.weight"
    forth, back = _replay(case)[shared], _replay(replace(case, adapters=case.adapters[::-1]))[shared]
    actual = oracle.values(case.merged[shared])
    assert np.sum(forth != actual) <= 1 < np.sum(back != actual)


def test_rounding_between_is_what_replays_two_adapters(get_case: GetCase) -> None:
    """The oracle's own option agrees with the replay written out above."""
    case = get_case("llama-two-adapters", "bf16", False)
    made = oracle.expected_checkpoint(case.base, case.adapters, dict(case.world.kinds), round_between="bf16")
    replayed = _replay(case)
    for name, tensor in made.items():
        assert np.array_equal(oracle.round_to(tensor, "bf16"), replayed[name]), name

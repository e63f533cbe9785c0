"""The whole line on live inputs: what may be given, what comes out, and that nothing but a proof is called verified."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft_worlds
import pytest
import torch
from torch import Tensor, nn

import lora_check
from lora_check import Verdict, pipeline
from lora_check.__main__ import main
from lora_check.errors import AdapterConfigError, LoraCheckError, UsageError
from lora_check.report import Report

ROOT = Path(__file__).parents[1]
PEFT = "base_model.model."
OUT, IN, R, ALPHA = 20, 14, 5, 7
FAMILIES, LAYERS = ("q_proj", "v_proj", "up_proj"), 4
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Toy:
    """A base, an adapter folder, and the merge of both by one formula in plain torch."""

    base: Tensors
    factors: Tensors
    adapter: Path
    merged: Tensors
    scale: float

    def product(self, name: str) -> Tensor:
        module = name.removesuffix(".weight")
        a, b = (self.factors[f"{PEFT}{module}.lora_{side}.weight"].float() for side in "AB")
        return b @ a

    def added(self, name: str, scale: float) -> Tensor:
        return (self.base[name].float() + scale * self.product(name)).to(self.base[name].dtype)

    @property
    def targets(self) -> list[str]:
        return [name for name in self.base if name.endswith("proj.weight")]

    def check(self, merged: Mapping[str, Tensor] | None = None, **options: Any) -> Report:
        return pipeline.check(self.base, self.adapter, self.merged if merged is None else dict(merged), **options)


@pytest.fixture
def toy(save, tmp_path) -> Callable[..., Toy]:
    """(dtype, changes to the factors, keys of the configuration) -> a toy of four layers and three families."""

    def make(
        dtype: torch.dtype = torch.float32,
        change: Callable[[Tensors], Tensors] = dict,
        more: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        **config: Any,
    ) -> Toy:
        random = torch.Generator().manual_seed(seed)

        def numbers(*shape: int, of: float = 0.05) -> Tensor:
            return of * torch.randn(*shape, generator=random)

        names = [f"model.layers.{n}.{leaf}.weight" for n in range(LAYERS) for leaf in FAMILIES]
        base = {name: numbers(OUT, IN).to(dtype) for name in names}
        base |= {f"model.layers.{n}.norm.weight": (1 + numbers(IN)).to(dtype) for n in range(LAYERS)}
        base |= {"model.embed_tokens.weight": numbers(30, IN).to(dtype), "lm_head.weight": numbers(30, IN).to(dtype)}
        factors: Tensors = {}
        for name in names:
            module = name.removesuffix(".weight")
            factors[f"{PEFT}{module}.lora_A.weight"] = numbers(R, IN, of=0.1)
            factors[f"{PEFT}{module}.lora_B.weight"] = numbers(OUT, R, of=0.1)
        factors = change(factors)
        whole = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": list(FAMILIES), **config}
        (tmp_path / "adapter_config.json").write_text(json.dumps(whole))
        adapter = save(factors, tmp_path, "adapter_model.safetensors")
        base |= dict(more or {})
        scale = whole["lora_alpha"] / whole["r"]
        made = Toy(base, factors, adapter, {}, scale)
        paired = [name for name in names if _sound(factors, name)]
        made.merged.update(base | {name: made.added(name, scale) for name in paired})
        return made

    return make


def _sound(factors: Tensors, name: str) -> bool:
    pair = [factors.get(f"{PEFT}{name.removesuffix('.weight')}.lora_{side}.weight") for side in "AB"]
    return all(one is not None and one.ndim == 2 for one in pair)


def codes(report: Report) -> set[str]:
    return {one.code for one in report.findings}


def verdicts(report: Report) -> dict[str, str]:
    return {one.tensor: one.verdict.value for one in report.comparisons}


def refuted(report: Report) -> set[str]:
    return {name for name, word in verdicts(report).items() if word == "refuted"}


def timeless(report: Report, *, places: bool = True) -> dict[str, Any]:
    """The JSON form without the seconds, and on demand without what tells where the inputs lay."""
    whole = report.as_dict()
    whole["summary"] = {
        key: value
        for key, value in whole["summary"].items()
        if key not in ("seconds", "gb_per_second", "cpu_seconds", "read_ceiling_gb_per_second", "bound")
    }
    if not places:
        del whole["inputs"]
    return whole


def verdict_or_refusal(check: Callable[[], Report]) -> str:
    """The verdict, or the sentence in which the inputs were refused."""
    try:
        return check().verdict.value
    except LoraCheckError as refusal:
        return f"refused: {refusal.message}"


def flipped(tensor: Tensor) -> Tensor:
    """The lowest bit of the first element flipped."""
    raw = tensor.clone().contiguous()
    raw.reshape(-1).view(torch.uint8)[0] ^= 1
    return raw


def bits(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {name: bytes(one.contiguous().reshape(-1).view(torch.uint8).tolist()) for name, one in tensors.items()}


# ------------------------------------------------------------------------------------------- what may be given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_toy_itself_is_verified_and_its_inputs_are_left_alone(toy, dtype) -> None:
    made = toy(dtype)
    before = bits(made.base) | {f"merged {name}": raw for name, raw in bits(made.merged).items()}
    report = made.check()
    assert (report.verdict, report.exit_code, codes(report)) == (Verdict.VERIFIED, 0, set())
    assert len([one for one in report.comparisons if one.kind == "target"]) == LAYERS * len(FAMILIES)
    assert before == bits(made.base) | {f"merged {name}": raw for name, raw in bits(made.merged).items()}


@pytest.mark.parametrize("name", ["llama-qv", "llama-tied-head", "gpt2", "llama-saved-head"])
def test_folders_files_state_dicts_and_modules_are_one_to_the_check(world, load, name) -> None:
    inputs = world(name, "bf16")
    model = peft_worlds.RECIPES[name].model()
    modules = {side: type(model).from_pretrained(path, dtype=torch.bfloat16) for side, path in _sides(inputs).items()}
    files = {side: path / "model.safetensors" for side, path in _sides(inputs).items()}
    tensors = {side: load(path) for side, path in _sides(inputs).items()}
    expected = timeless(lora_check.check(*inputs.args), places=False)
    assert expected["verdict"] == "verified"
    for given in (modules, files, tensors, {**modules, "base": inputs.base}, {**tensors, "merged": inputs.merged}):
        report = lora_check.check(given["base"], inputs.adapters[0], given["merged"])
        found = timeless(report, places=False)
        by_name = {one["name"]: one for one in found["tensors"]}
        assert by_name == {one["name"]: one for one in expected["tensors"]}
        assert found["summary"] == expected["summary"]
        assert found["verdict"] == "verified"


def _sides(inputs) -> dict[str, Path]:
    return {"base": inputs.base, "merged": inputs.merged}


def test_strings_and_paths_are_locations_alike(world) -> None:
    inputs = world("llama-qv")
    as_text = lora_check.check(str(inputs.base), [str(inputs.adapters[0])], str(inputs.merged))
    assert timeless(as_text) == timeless(lora_check.check(*inputs.args))


@pytest.mark.parametrize("name", ["llama-qv", "llama-bias-all", "llama-dora", "gpt2", "llama-saved-norm-and-embed"])
def test_a_live_peft_model_is_an_adapter(world, name) -> None:
    from peft import PeftModel

    inputs = world(name)
    base = type(peft_worlds.RECIPES[name].model()).from_pretrained(inputs.base)
    with quiet():
        tuned = PeftModel.from_pretrained(base, inputs.adapters[0])
    report = lora_check.check(inputs.base, tuned, inputs.merged)
    assert report.verdict is Verdict.VERIFIED, codes(report)
    assert {one.tensor: one.kind for one in report.comparisons} == {
        one.tensor: one.kind for one in lora_check.check(*inputs.args).comparisons
    }


@contextmanager
def quiet() -> Iterator[None]:
    """What PEFT and transformers say of these worlds by design is no failure of a test."""
    with warnings.catch_warnings():
        for category, message in peft_worlds.EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        yield


def test_a_state_dict_cannot_be_an_adapter_for_it_has_no_scale(toy) -> None:
    made = toy()
    with pytest.raises(AdapterConfigError, match=r"has no adapter_config\.json$"):
        lora_check.check(made.base, made.factors, made.merged)


@pytest.mark.parametrize("broken", [False, True])
def test_pickles_and_safetensors_are_one_to_the_check(toy, save, tmp_path, broken) -> None:
    made = toy(torch.bfloat16)
    merged = {**made.merged, "model.layers.2.q_proj.weight": made.base["model.layers.2.q_proj.weight"]}
    reports = []
    for model, adapter in (("model", "adapter_model"), ("pytorch_model", "adapter_model")):
        suffix = "bin" if model == "pytorch_model" else "safetensors"
        base, other = (
            save(one, tmp_path, f"{model}.{suffix}") for one in (made.base, merged if broken else made.merged)
        )
        reports.append(lora_check.check(base, save(made.factors, made.adapter, f"{adapter}.{suffix}"), other))
    one, two = (in_one_order(timeless(report, places=False)) for report in reports)
    assert one == two
    assert one["verdict"] == ("refuted" if broken else "verified")


def in_one_order(whole: dict[str, Any]) -> dict[str, Any]:
    """The JSON form with its lists sorted: safetensors sorts the tensors of a file, pickle keeps their order."""
    keys = {"tensors": "name", "families": "family", "findings": "code"}
    return whole | {key: sorted(whole[key], key=lambda one, by=by: one[by]) for key, by in keys.items()}


def test_the_same_object_as_base_and_merged_is_refused(toy) -> None:
    made = toy()
    with pytest.raises(LoraCheckError, match="same"):
        lora_check.check(made.base, made.adapter, made.base)


# ------------------------------------------------------------------------------------------- weights and order


@pytest.mark.parametrize("weight", [0.5, -1.0, 2.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_is_a_factor_on_the_scale(toy, weight, dtype) -> None:
    made = toy(dtype)
    weighted = made.merged | {name: made.added(name, weight * made.scale) for name in made.targets}
    assert made.check(weighted, weights=[weight]).verdict is Verdict.VERIFIED
    assert refuted(made.check(weighted)) == set(made.targets)
    assert refuted(made.check(weights=[weight])) == set(made.targets)


@pytest.mark.parametrize("weights", [[], [1.0, 1.0], [0.5, 1, 2]])
def test_one_weight_for_each_adapter_or_none(toy, weights) -> None:
    with pytest.raises(UsageError, match=f"{len(weights)} weights for 1 adapters"):
        toy().check(weights=weights)


def test_a_weight_of_nothing_proves_nothing(toy) -> None:
    made = toy()
    assert made.check(made.base | {}, weights=[0.0]).verdict is Verdict.INCONCLUSIVE


def test_each_adapter_has_its_own_weight(world, load) -> None:
    inputs = world("llama-two-adapters")
    base, merged = load(inputs.base), load(inputs.merged)
    assert lora_check.check(*inputs.args, weights=[1, 1]).verdict is Verdict.VERIFIED
    halved = lora_check.check(base, list(inputs.adapters), merged, weights=[1, 0.5])
    assert {name.split(".")[-2] for name in refuted(halved)} == {"q_proj", "up_proj"}


def test_the_wrong_order_of_two_adapters_is_noticed_in_half_precision(world) -> None:
    right = world("llama-two-adapters", "bf16")
    wrong = right.but(adapters=right.adapters[::-1])
    report = lora_check.check(*wrong.args)
    assert report.verdict is Verdict.REFUTED
    assert {name.split(".")[-2] for name in refuted(report)} == {"q_proj"}
    assert lora_check.check(*right.args).verdict is Verdict.VERIFIED


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_forgotten_and_a_repeated_adapter_are_noticed(world, dtype) -> None:
    inputs = world("llama-two-adapters", dtype)
    first, second = inputs.adapters
    for given in ([first], [second], [first, first], [first, second, second], [second, first, second]):
        assert lora_check.check(inputs.base, given, inputs.merged).verdict is Verdict.REFUTED


# ---------------------------------------------------------------------------------------- what is not looked at


def test_what_is_left_out_keeps_a_report_from_verified(toy) -> None:
    made = toy()
    for options in ({"include": ["*q_proj*"]}, {"exclude": ["*norm*"]}, {"exclude": ["lm_head.weight"]}):
        report = made.check(**options)
        assert (report.verdict, report.exit_code) == (Verdict.INCONCLUSIVE, 3)
        assert "LC305" in codes(report)
    assert made.check(include=["*"]).verdict is Verdict.VERIFIED


def test_what_is_looked_at_is_still_refuted_and_what_is_not_is_not(toy) -> None:
    made = toy()
    broken = made.merged | {"model.layers.1.q_proj.weight": made.base["model.layers.1.q_proj.weight"]}
    assert made.check(broken, include=["*q_proj*"]).verdict is Verdict.REFUTED
    assert made.check(broken, exclude=["*q_proj*"]).verdict is Verdict.INCONCLUSIVE
    others = {name for name in made.base if "q_proj" not in name}
    assert set(verdicts(made.check(broken, exclude=["*q_proj*"]))) == others


def test_a_pattern_that_fits_nothing_proves_nothing(toy) -> None:
    report = toy().check(include=["*.no_such_module.*"])
    assert (report.verdict, report.comparisons) == (Verdict.INCONCLUSIVE, ())
    json.dumps(report.as_dict(), allow_nan=False)


FILTERS = [
    {},
    {"select": ["LC9"]},
    {"ignore": ["LC"]},
    {"select": ["LC1"]},
    {"ignore": ["LC1", "LC5"]},
    {"select": ["LC302"], "ignore": ["LC302"]},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_select_and_ignore_filter_the_list_and_never_the_verdict(toy, filters) -> None:
    made = toy()
    layer = {name: made.base[name] for name in made.targets if ".2." in name}
    for merged, word in ((made.merged, Verdict.VERIFIED), (made.merged | layer, Verdict.REFUTED), (made.base, None)):
        whole, seen = made.check(merged), made.check(merged, **filters)
        assert seen.verdict is whole.verdict
        assert word is None or seen.verdict is word
        assert seen.exit_code == whole.exit_code
        assert seen.comparisons == whole.comparisons
        assert len(seen.findings) + seen.withheld == len(whole.findings)
        assert list(seen.findings) == [one for one in whole.findings if _wanted(one.code, **filters)]


def _wanted(code: str, select: list[str] | None = None, ignore: list[str] | None = None) -> bool:
    return (not select or code.startswith(tuple(select))) and not (ignore and code.startswith(tuple(ignore)))


def test_a_silenced_inconclusive_report_stays_inconclusive(toy, save, tmp_path, capsys) -> None:
    made = toy()
    inputs = [str(save(made.base, tmp_path)), str(made.adapter), str(save(made.merged, tmp_path))]
    assert main(["report", *inputs, "--exclude", "*norm*", "--ignore", "LC"]) == 3
    assert capsys.readouterr().out.startswith("inconclusive: ")
    assert main(["report", *inputs, "--ignore", "LC"]) == 0


# ------------------------------------------------------------------------------------------------- same answer


@pytest.mark.parametrize("name", ["llama-all-seven", "llama-two-adapters", "llama-tied-both", "gpt2-dora"])
@pytest.mark.parametrize("swapped", [False, True])
def test_the_number_of_workers_changes_nothing(world, name, swapped) -> None:
    inputs = world(name, "bf16")
    if swapped:
        inputs = inputs.but(base=inputs.merged, merged=inputs.base)
    one, two, five = (timeless(lora_check.check(*inputs.args, jobs=jobs)) for jobs in (1, 2, 5))
    assert one == two == five
    assert one["verdict"] == ("refuted" if swapped else "verified")


def test_the_number_of_threads_is_given_back(toy) -> None:
    made = toy()
    torch.set_num_threads(2)
    try:
        made.check(jobs=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# ------------------------------------------------------------------------------------- nothing proves nothing


def zeroed(side: str) -> Callable[[Tensors], Tensors]:
    return lambda factors: {
        name: torch.zeros_like(one) if f"lora_{side}" in name else one for name, one in factors.items()
    }


VACUOUS = {
    "no tensors": (lambda factors: {}, {}),
    "B is zero": (zeroed("B"), {}),
    "A is zero": (zeroed("A"), {}),
    "B is negative zero": (lambda f: {n: -torch.zeros_like(one) if "lora_B" in n else one for n, one in f.items()}, {}),
    "alpha is zero": (dict, {"lora_alpha": 0}),
    "numel 0, as ZeRO-3 saves": (lambda factors: {name: torch.zeros(0) for name in factors}, {}),
    "another model's names": (lambda f: {n.replace("model.layers", "net.blocks"): one for n, one in f.items()}, {}),
    "below the storage resolution": (lambda f: {n: 1e-5 * one for n, one in f.items()}, {}),
    "far below the storage resolution": (lambda f: {n: 1e-12 * one for n, one in f.items()}, {}),
    "rank zero": (
        lambda f: {n: one[:0] if "lora_A" in n else one[:, :0] for n, one in f.items()},
        {},
    ),
    "half a pair": (lambda f: {n: one for n, one in f.items() if "lora_A" in n}, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", VACUOUS)
def test_an_adapter_that_changes_nothing_is_never_verified(toy, case, dtype) -> None:
    change, config = VACUOUS[case]
    made = toy(dtype, change, **config)
    report = made.check({name: one.clone() for name, one in made.base.items()})
    assert report.verdict is Verdict.INCONCLUSIVE
    assert report.exit_code == 3
    assert "below" not in case or codes(report) == {"LC302"}, "a delta that cannot be stored is not zero"
    assert report.findings
    json.dumps(report.as_dict(), allow_nan=False)


def test_no_adapter_at_all_is_never_verified(toy) -> None:
    made = toy()
    outcome = verdict_or_refusal(lambda: lora_check.check(made.base, [], dict(made.base)))
    assert outcome == "inconclusive" or "adapter" in outcome


ROWS = {
    "no indices": {},
    "the indices of another module": {"trainable_token_indices": {"wte": [1, 2]}},
    "fewer indices than rows": {"trainable_token_indices": {"embed_tokens": []}},
    "more indices than rows": {"trainable_token_indices": {"embed_tokens": [1, 2, 3]}},
    "indices beyond the vocabulary": {"trainable_token_indices": {"embed_tokens": [30, 31]}},
    "negative indices": {"trainable_token_indices": {"embed_tokens": [-1, -2]}},
}


@pytest.mark.parametrize("case", ROWS)
def test_trained_rows_that_were_never_applied_are_never_verified(toy, case) -> None:
    rows = {f"{PEFT}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, IN)}
    made = toy(change=lambda factors: factors | rows, **ROWS[case])
    outcome = verdict_or_refusal(made.check)
    assert outcome in ("inconclusive", "refuted") or "token" in outcome


def test_trained_rows_are_verified_where_they_were_applied_and_refuted_where_not(toy) -> None:
    name = "model.embed_tokens"
    rows = {f"{PEFT}{name}.token_adapter.trainable_tokens_delta": torch.ones(2, IN)}
    made = toy(torch.bfloat16, lambda factors: factors | rows, trainable_token_indices={"embed_tokens": [0, 29]})
    assert refuted(made.check()) == {f"{name}.weight"}
    applied = made.merged[f"{name}.weight"].clone()
    applied[[0, 29]] = 1
    assert made.check(made.merged | {f"{name}.weight": applied}).verdict is Verdict.VERIFIED


@pytest.mark.parametrize("key", ["lora_A.default.weight", "lora_B.default.weight"])
def test_a_second_factor_for_one_place_is_never_silently_left_out(toy, key) -> None:
    second = f"{PEFT}model.layers.0.q_proj.{key}"

    def change(factors: Tensors) -> Tensors:
        return {second: 2 * factors[second.replace(".default", "")]} | factors

    report = toy(change=change).check()
    assert report.verdict is not Verdict.VERIFIED


@pytest.mark.parametrize(
    ("case", "code"), [("no tensors", "LC003"), ("B is zero", "LC004"), ("numel 0, as ZeRO-3 saves", "LC003")]
)
def test_an_empty_and_a_zero_adapter_are_told_apart(toy, case, code) -> None:
    made = toy(torch.float32, VACUOUS[case][0])
    assert code in codes(made.check(dict(made.base)))


@pytest.mark.parametrize("case", ["no tensors", "B is zero", "another model's names"])
def test_a_changed_bystander_is_refuted_even_then(toy, case) -> None:
    made = toy(torch.float32, VACUOUS[case][0])
    report = made.check(made.base | {"lm_head.weight": flipped(made.base["lm_head.weight"])})
    assert report.verdict is Verdict.REFUTED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [1, 1e-2, 1e-3, 1e-7, 1e-8])
def test_survival_is_what_the_stored_bits_keep_of_the_true_delta(toy, dtype, depth) -> None:
    made = toy(dtype, lambda factors: {n: depth * one if "lora_B" in n else one for n, one in factors.items()})
    for one in made.check().comparisons:
        if one.kind == "target" and not one.vanished:
            delta = made.scale * made.product(one.tensor).double()
            kept = made.merged[one.tensor].double() - made.base[one.tensor].double()
            assert one.survival == pytest.approx(((kept * delta).sum() / (delta * delta).sum()).item(), rel=0.01)


def test_one_zero_target_among_many_is_no_doubt(toy) -> None:
    name = f"{PEFT}model.layers.0.q_proj.lora_B.weight"
    made = toy(torch.float32, lambda factors: factors | {name: torch.zeros_like(factors[name])})
    assert made.check().verdict is Verdict.VERIFIED


# -------------------------------------------------------------------------------- names, shapes, dtypes, bytes


def test_missing_extra_and_reshaped_tensors_are_refuted_and_named(toy) -> None:
    made = toy()
    target, norm = made.targets[0], "model.layers.0.norm.weight"
    changes = {
        "LC201": {name: one for name, one in made.merged.items() if name != norm},
        "LC202": made.merged | {"model.layers.9.norm.weight": made.merged[norm]},
        "LC203": made.merged | {target: made.merged[target].T.contiguous()},
    }
    for code, merged in changes.items():
        report = made.check(merged)
        assert report.verdict is Verdict.REFUTED
        assert codes(report) == {code}
    flat = made.check(made.merged | {norm: made.merged[norm].reshape(1, -1)})
    assert codes(flat) == {"LC203"}


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_another_storage_dtype_is_told_and_verified(toy, storage) -> None:
    made = toy()
    report = made.check({name: one.to(storage) for name, one in made.merged.items()})
    assert (report.verdict, codes(report)) == (Verdict.VERIFIED, {"LC204"})
    wrong = made.check({name: made.base[name].to(storage) for name in made.base})
    assert refuted(wrong) == set(made.targets)


def test_a_wider_storage_dtype_is_told_and_verified(toy) -> None:
    made = toy(torch.bfloat16)
    report = made.check({name: one.float() for name, one in made.merged.items()})
    assert (report.verdict, codes(report)) == (Verdict.VERIFIED, {"LC204"})


STRANGE = {
    "int64": torch.arange(12).reshape(3, 4),
    "int32": torch.arange(5, dtype=torch.int32),
    "uint8": torch.arange(9, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "fp8": torch.linspace(-2, 2, 16).reshape(4, 4).to(torch.float8_e4m3fn),
    "fp8 wide": torch.linspace(-2, 2, 16).to(torch.float8_e5m2),
    "0-d": torch.tensor(7),
    "0-d float": torch.tensor(0.5),
    "fp64": torch.linspace(0, 1, 7, dtype=torch.float64),
    "NaN": torch.tensor([1.0, torch.nan, -torch.inf]),
    "odd": torch.ones(3, 5, 7, dtype=torch.float16),
    "uint16": torch.arange(9).to(torch.uint16),
    "uint32": torch.arange(9).to(torch.uint32),
    "uint64": torch.arange(9).to(torch.uint64),
    "fp8 of scales": torch.ones(5).to(torch.float8_e8m0fnu),
    "complex64": torch.ones(5, dtype=torch.complex64),
}
NOTHING = {"empty": torch.zeros(0, 4), "empty rows": torch.zeros(4, 0), "empty ints": torch.zeros(0, dtype=torch.int64)}


@pytest.mark.parametrize("name", STRANGE | NOTHING)
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_bystander_of_any_kind_is_compared_bit_by_bit(toy, save, tmp_path, on_disk, name) -> None:
    tensor = (STRANGE | NOTHING)[name]
    made = toy(torch.bfloat16, more={"buffer": tensor})

    def check(merged: Tensors) -> Report:
        if not on_disk:
            return made.check(merged)
        return lora_check.check(save(made.base, tmp_path), made.adapter, save(merged, tmp_path))

    assert check(made.merged).verdict is Verdict.VERIFIED
    if name in NOTHING:
        assert "LC203" in codes(check(made.merged | {"buffer": torch.zeros(1, 4)}))
        return
    report = check(made.merged | {"buffer": flipped(tensor)})
    assert refuted(report) == {"buffer"}
    assert report.verdict is Verdict.REFUTED


def test_a_state_dict_may_hold_views_and_parameters(toy) -> None:
    made = toy(
        torch.bfloat16, more={"buffer.strided": torch.randn(9, 8)[::2, ::3], "buffer.wide": torch.ones(1).expand(4)}
    )
    merged = {name: nn.Parameter(one, requires_grad=one.is_floating_point()) for name, one in made.merged.items()}
    merged |= {name: one.T.contiguous().T for name, one in made.merged.items() if one.ndim == 2}
    assert made.check(merged).verdict is Verdict.VERIFIED
    assert refuted(made.check(merged | {"buffer.wide": torch.tensor([1.0, 1, 1, 2])})) == {"buffer.wide"}


@pytest.mark.parametrize("kind", ["complex128", "sparse", "meta"])
def test_what_cannot_be_compared_is_no_crash(toy, kind) -> None:
    tensor = {
        "complex128": torch.ones(4, dtype=torch.complex128),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.ones(3, device="meta"),
    }[kind]
    made = toy(more={"buffer": tensor})
    outcome = verdict_or_refusal(made.check)
    assert outcome in ("inconclusive", "verified") or "buffer" in outcome


def test_negative_zero_is_not_zero(toy) -> None:
    made = toy(more={"buffer.zero": torch.zeros(3)})
    assert refuted(made.check(made.merged | {"buffer.zero": -torch.zeros(3)})) == {"buffer.zero"}


@pytest.mark.parametrize("side", ["merged", "base", "both"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_target_in_fp8_is_inconclusive(toy, save, tmp_path, side, on_disk) -> None:
    made = toy(torch.bfloat16)
    name = made.targets[0]
    base, merged = (
        {**tensors, name: tensors[name].to(torch.float8_e4m3fn)} if side in (which, "both") else tensors
        for which, tensors in (("base", made.base), ("merged", made.merged))
    )
    given = (save(base, tmp_path), save(merged, tmp_path)) if on_disk else (base, merged)
    report = lora_check.check(given[0], made.adapter, given[1])
    assert (report.verdict, report.exit_code) == (Verdict.INCONCLUSIVE, 3)
    assert "LC303" in codes(report)
    assert verdicts(report)[name] == "inconclusive"
    worse = {**merged, made.targets[1]: made.base[made.targets[1]]}
    assert lora_check.check(base, made.adapter, worse).verdict is Verdict.REFUTED


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool], ids=str)
def test_a_target_in_integers_is_inconclusive(toy, dtype) -> None:
    made = toy()
    name = made.targets[0]
    base, merged = (tensors | {name: (100 * tensors[name]).to(dtype)} for tensors in (made.base, made.merged))
    report = lora_check.check(base, made.adapter, merged)
    assert (report.verdict, "LC303" in codes(report)) == (Verdict.INCONCLUSIVE, True)


def test_a_retyped_counter_is_not_verified(toy) -> None:
    made = toy(more={"buffer.count": torch.arange(5)})
    report = made.check(made.merged | {"buffer.count": torch.arange(5, dtype=torch.int32)})
    assert report.verdict is not Verdict.VERIFIED


class Tied(nn.Module):
    """An embedding and a head that are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(30, IN)
        self.q_proj = nn.Linear(IN, OUT, bias=False)
        self.lm_head = nn.Linear(IN, 30, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def test_a_tied_module_is_checked_under_one_name(save, tmp_path) -> None:
    torch.manual_seed(0)
    base, merged = Tied(), Tied()
    merged.load_state_dict(base.state_dict())
    a, b = torch.randn(R, IN), torch.randn(OUT, R)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": ALPHA}))
    factors = {f"{PEFT}q_proj.lora_A.weight": a, f"{PEFT}q_proj.lora_B.weight": b}
    adapter = save(factors, tmp_path, "adapter_model.safetensors")
    with torch.no_grad():
        merged.q_proj.weight += (b @ a) * (ALPHA / R)
    report = lora_check.check(base, adapter, merged)
    assert (report.verdict, len(report.comparisons)) == (Verdict.VERIFIED, 2)
    with torch.no_grad():
        merged.embed_tokens.weight[0, 0] += 1
    report = lora_check.check(base, adapter, merged)
    assert len(refuted(report)) == 1
    assert report.verdict is Verdict.REFUTED


def test_a_tied_merge_in_one_name_only_is_verified_however_it_was_saved(world, load, save) -> None:
    """transformers keeps the embedding, torch both, safetensors' save_model the head."""
    for name in ("llama-tied-embed", "llama-tied-trainable-tokens"):
        inputs = world(name, "bf16")
        merged = load(inputs.merged)
        embedding = merged.pop("model.embed_tokens.weight")
        both = ["model.embed_tokens.weight", "lm_head.weight"]
        for names in (both[:1], both, both[1:]):
            saved = save(merged | dict.fromkeys(names, embedding), inputs.merged)
            report = lora_check.check(inputs.base, list(inputs.adapters), saved)
            assert report.verdict is Verdict.VERIFIED, (name, names, codes(report))


# ------------------------------------------------------------------------------------------------ real mistakes


@pytest.mark.parametrize("name", ["llama-qv", "llama-saved-head", "llama-dora", "llama-tied-embed"])
@pytest.mark.parametrize("inner", [False, True])
def test_an_unmerged_peft_model_saved_as_merged_is_named(world, save, name, inner) -> None:
    from peft import PeftModel

    inputs = world(name)
    base = type(peft_worlds.RECIPES[name].model()).from_pretrained(inputs.base)
    with quiet():
        tuned = PeftModel.from_pretrained(base, inputs.adapters[0])
    saved = save((tuned.base_model.model if inner else tuned).state_dict(), inputs.merged)
    report = lora_check.check(inputs.base, inputs.adapters[0], saved)
    assert report.verdict is Verdict.REFUTED
    assert "LC207" in codes(report)
    assert "LC201" not in codes(report)


def test_the_model_that_merge_and_unload_was_called_on_is_named(world, save) -> None:
    """The base itself, saved under its own names: the adapter was never applied."""
    inputs = world("llama-qv")
    base = type(peft_worlds.RECIPES["llama-qv"].model()).from_pretrained(inputs.base)
    saved = save(base.state_dict(), inputs.merged)
    report = lora_check.check(inputs.base, inputs.adapters[0], saved)
    errors = {one.code for one in report.findings if one.severity == "error"}
    assert (report.verdict, errors) == (Verdict.REFUTED, {"LC101"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_base_is_named(toy, dtype) -> None:
    made, other = toy(dtype), toy(dtype, seed=1)
    report = lora_check.check(other.base, made.adapter, made.merged)
    assert report.verdict is Verdict.REFUTED
    assert "LC404" in codes(report)
    assert not {"LC401", "LC199"} & codes(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_base_and_merged_swapped_is_named(toy, dtype) -> None:
    made = toy(dtype)
    report = lora_check.check(made.merged, made.adapter, made.base)
    assert report.verdict is Verdict.REFUTED
    assert "LC113" in codes(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("number", "code"), [(ALPHA, "LC108"), (1.0, "LC111"), (0.9 * ALPHA / R, "LC110")])
def test_two_mistakes_at_once_are_both_named(toy, dtype, number, code) -> None:
    made = toy(dtype)
    wrong = {name: made.added(name, number) for name in made.targets if "up_proj" in name}
    skipped = {name: made.base[name] for name in made.targets if ".2." in name and "up_proj" not in name}
    report = made.check(made.merged | wrong | skipped)
    assert report.verdict is Verdict.REFUTED
    assert refuted(report) == {*wrong, *skipped}
    by_code = {one.code: set(one.tensors) for one in report.findings}
    assert by_code.get(code) == set(wrong)
    assert {name for other in by_code.keys() - {code} for name in by_code[other]} == set(skipped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none_are_refuted_wherever_they_stand(toy, dtype, value) -> None:
    made = toy(dtype)
    for name in (made.targets[3], "lm_head.weight"):
        spoilt = made.merged[name].clone()
        spoilt[-1, -1] = value
        report = made.check(made.merged | {name: spoilt})
        assert refuted(report) == {name}
        assert "LC130" in codes(report)
        json.dumps(report.as_dict(), allow_nan=False)


def peft_merge(base: Path, adapter: Path) -> Tensors:
    """What PEFT itself writes, unsafe."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    with quiet():
        model = LlamaForCausalLM.from_pretrained(base, dtype="auto")
        return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_merge_by_peft_of_an_adapter_with_a_number_that_is_none_is_refuted(world, load, save, dtype, value) -> None:
    inputs = world("llama-qv", dtype)
    factors = load(inputs.adapters[0])
    name = next(name for name in factors if "layers.1.self_attn.q_proj.lora_A" in name)
    factors[name][0, 0] = value
    adapter = save(factors, inputs.adapters[0], "adapter_model.safetensors")
    report = lora_check.check(inputs.base, adapter, save(peft_merge(inputs.base, adapter), inputs.merged))
    assert report.verdict is Verdict.REFUTED
    assert "LC130" in codes(report)
    assert refuted(report) == {"model.layers.1.self_attn.q_proj.weight"}
    json.dumps(report.as_dict(), allow_nan=False)


def test_a_merge_by_peft_that_overflows_fp16_is_refuted(world, load, save) -> None:
    inputs = world("llama-qv", "fp16")
    factors = {name: one * (3e4 if "layers.0" in name else 1) for name, one in load(inputs.adapters[0]).items()}
    adapter = save(factors, inputs.adapters[0], "adapter_model.safetensors")
    merged = peft_merge(inputs.base, adapter)
    assert merged["model.layers.0.self_attn.q_proj.weight"].isinf().any()
    report = lora_check.check(inputs.base, adapter, save(merged, inputs.merged))
    assert report.verdict is Verdict.REFUTED
    assert "LC130" in codes(report)


def test_an_adapter_that_nobody_can_merge_is_inconclusive_with_the_reason(world, save, tmp_path, capsys) -> None:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import LlamaForCausalLM

    inputs = world("llama-qv")
    torch.manual_seed(0)
    with quiet():
        tuned = get_peft_model(
            LlamaForCausalLM.from_pretrained(inputs.base),
            PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        )
        tuned.save_pretrained(tmp_path / "prompt")
        merged = save(LlamaForCausalLM.from_pretrained(inputs.base).state_dict(), inputs.merged)
    report = lora_check.check(inputs.base, tmp_path / "prompt", merged)
    assert (report.verdict, report.exit_code) == (Verdict.INCONCLUSIVE, 3)
    assert "LC301" in codes(report)
    assert main(["report", str(inputs.base), str(tmp_path / "prompt"), str(merged)]) == 3
    assert "nothing to merge" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- the contract

CONTRACT = {
    "": "schema tool command inputs verdict exit_code summary families findings tensors",
    "inputs": "base adapters merged",
    "summary": "tensors targets bystanders copies verified refuted inconclusive exact"
    " arithmetic survival bytes_read seconds",
    "families": "family targets verified refuted inconclusive survival worst",
    "findings": "code name severity message help count tensors evidence",
    "tensors": "name kind recipe adapters shape dtype verdict exact"
    " arithmetic over_budget worst residual survival code",
}


def demand_contract(whole: Mapping[str, Any]) -> None:
    """Every key of the contract is there, at every level, and the counts agree with each other."""
    text = json.dumps(whole, allow_nan=False)
    assert json.loads(text) == whole
    for place, keys in CONTRACT.items():
        entries = whole if not place else whole[place]
        for entry in entries if isinstance(entries, list) else [entries]:
            assert set(keys.split()) <= set(entry), place
    assert whole["schema"] == 1
    assert whole["verdict"] in ("verified", "refuted", "inconclusive")
    assert whole["exit_code"] == {"verified": 0, "refuted": 1, "inconclusive": 3}[whole["verdict"]]
    summary, tensors = whole["summary"], whole["tensors"]
    assert summary["tensors"] == len(tensors) == sum(summary[word] for word in ("verified", "refuted", "inconclusive"))
    assert summary["tensors"] == sum(summary[kind] for kind in ("targets", "bystanders", "copies"))
    for word in ("verified", "refuted", "inconclusive"):
        assert summary[word] == sum(one["verdict"] == word for one in tensors)
    assert summary["exact"] == sum(one["exact"] for one in tensors)
    assert sum(one["targets"] for one in whole["families"]) == summary["targets"]
    assert {one["kind"] for one in tensors} <= {"target", "bystander", "copy"}
    assert all(one["count"] == len(one["tensors"]) for one in whole["findings"])
    assert isinstance(whole["inputs"]["adapters"], list)
    assert all({"location"} <= set(one) for one in (whole["inputs"]["base"], whole["inputs"]["merged"]))


@pytest.fixture
def reports(toy) -> dict[str, Report]:
    """One report of every sort."""
    made = toy(torch.bfloat16, more={"buffer.count": torch.tensor(3), "buffer.none": torch.zeros(0)})
    spoilt = {name: torch.full_like(made.merged[name], torch.nan) for name in made.targets[:2]}
    zero = toy(change=zeroed("B"))
    return {
        "verified": made.check(),
        "refuted": made.check(made.base | {}),
        "wrong scale": made.check(made.merged | {name: made.added(name, 0.9) for name in made.targets}),
        "not a number": made.check(made.merged | spoilt),
        "left out": made.check(include=["*q_proj*"]),
        "nothing": made.check(include=["nothing"]),
        "vacuous": zero.check(zero.base | {}),
        "missing": made.check({"lm_head.weight": made.merged["lm_head.weight"]}),
        "fp8": made.check({name: one.to(torch.float8_e5m2) for name, one in made.merged.items()}),
        "silenced": made.check(made.base | {}, ignore=["LC"]),
    }


def test_every_report_keeps_the_contract_of_the_json(reports) -> None:
    for report in reports.values():
        demand_contract(report.as_dict())
    assert {report.verdict.value for report in reports.values()} == {"verified", "refuted", "inconclusive"}


def test_a_key_that_is_gone_breaks_the_contract(reports) -> None:
    for place in CONTRACT:
        whole = reports["refuted"].as_dict()
        entry = whole if not place else whole[place]
        entry = entry[0] if isinstance(entry, list) else entry
        del entry[CONTRACT[place].split()[-1]]
        with pytest.raises((AssertionError, KeyError)):
            demand_contract(whole)


def test_every_report_can_be_rendered_in_every_form(reports) -> None:
    from lora_check import registry
    from lora_check.report import Style

    for report in reports.values():
        for renderer in registry.load("renderers").values():
            for style in (Style(), Style(all=True)):
                assert renderer.render(report, style).endswith("\n")


def test_assert_merged_is_silent_or_raises_with_the_report(toy) -> None:
    made = toy()
    assert lora_check.assert_merged(made.base, made.adapter, made.merged) is None
    with pytest.raises(AssertionError) as caught:
        lora_check.assert_merged(made.base, made.adapter, dict(made.base), jobs=1)
    text = str(caught.value)
    assert text.startswith("refuted: ")
    assert "LC101" in text
    zero = toy(change=zeroed("B"))
    with pytest.raises(AssertionError, match=r"^inconclusive: "):
        lora_check.assert_merged(zero.base, zero.adapter, dict(zero.base))


# -------------------------------------------------------------------------------------------------------- memory

PROBE = """
import json, sys, threading, time
import torch
import lora_check

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.over = 0, threading.Event()
        self.start()
    def run(self):
        while not self.over.wait(0.002):
            self.most = max(self.most, anonymous())
    def stop(self):
        self.over.set()
        self.join()
        return self.most

small, large = sys.argv[1:4], sys.argv[4:7]
lora_check.check(*small)
before, peak = anonymous(), Peak()
verdict = lora_check.check(*large).verdict.value
grown = peak.stop() - before
before, peak = anonymous(), Peak()
held = torch.ones(25_000_000)
time.sleep(0.05)
print(json.dumps({"verdict": verdict, "grown": grown, "control": peak.stop() - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the private memory of a process")
def test_private_memory_does_not_grow_with_the_model(toy, save, tmp_path) -> None:
    made = toy(torch.bfloat16)
    small = [save(made.base, tmp_path), made.adapter, save(made.merged, tmp_path)]
    rows, columns, names = 4096, 3072, [f"layers.{n}.q_proj.weight" for n in range(8)]
    torch.manual_seed(0)
    block = (0.05 * torch.randn(64, columns)).repeat(rows // 64, 1).bfloat16()
    base, merged, factors = {}, {}, {}
    for number, name in enumerate(names):
        a, b = 0.1 * torch.randn(2, columns), 0.1 * torch.randn(rows, 2)
        factors |= {f"{PEFT}{name[:-7]}.lora_A.weight": a, f"{PEFT}{name[:-7]}.lora_B.weight": b}
        base[name] = block
        merged[name] = (block.float() + 2 * (b @ a)).bfloat16() if number % 2 == 0 else block
    factors = {key: one for key, one in factors.items() if int(key.split(".")[3]) % 2 == 0}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    large = [save(base, tmp_path), save(factors, tmp_path, "adapter_model.safetensors"), save(merged, tmp_path)]
    files = [folder / "model.safetensors" for folder in (large[0], large[2])]
    assert sum(file.stat().st_size for file in files) > 400e6
    try:
        command = [sys.executable, "-c", PROBE, *map(str, [*small, *large])]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    finally:
        for file in files:
            file.unlink()
    told = json.loads(done.stdout)
    assert told["verdict"] == "verified"
    assert told["grown"] < 64 * 1024, told
    assert told["control"] > 90 * 1024, told

"""`parity` through the command line: what base and adapter say, against a live merge of the installed PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator

import peft_worlds
import pytest
from peft.tuners.lora import layer

from lora_check.__main__ import main

WORLDS = [
    ("llama-all-seven", "bf16"),
    ("llama-qv", "fp16"),
    ("gpt2", "fp32"),
    ("llama-dora", "bf16"),
    ("llama-two-adapters", "bf16"),
    ("llama-tied-embed", "bf16"),
    ("llama-tied-both", "fp32"),
    ("llama-rslora", "bf16"),
    ("llama-saved-head", "bf16"),
    ("llama-trainable-tokens", "fp32"),
    ("bert-classifier", "fp32"),
    ("adapter-bin", "bf16"),
]


@pytest.fixture(autouse=True)
def expected_warnings() -> Iterator[None]:
    """What PEFT says of these worlds by design is no failure of a test."""
    with warnings.catch_warnings():
        for category, message in peft_worlds.EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        yield


def ident(case: tuple[str, str]) -> str:
    return "-".join(case)


@pytest.fixture
def parity(world, tmp_path, capsys):
    """(world, dtype, options) -> exit code, stdout, JSON."""

    def run(name: str, dtype: str, *options: str):
        inputs = world(name, dtype)
        file = tmp_path / "parity.json"
        code = main(["parity", *inputs.argv[:-1], "--json", str(file), *options])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, json.loads(file.read_text())

    return run


def variants(told: dict) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for one in told["tensors"]:
        found.setdefault(one["variant"], []).append(one)
    return found


@pytest.mark.parametrize("case", WORLDS, ids=ident)
def test_a_live_merge_is_verified_unsafe_and_safe(parity, load, world, case) -> None:
    code, out, told = parity(*case)
    assert (code, told["verdict"], told["command"]) == (0, "verified", "parity")
    assert out.startswith("verified: ")
    found = variants(told)
    assert set(found) == {"unsafe", "safe"}
    names = set(load(world(*case).merged))
    for members in found.values():
        assert {one["name"] for one in members} == names
        assert len(members) == len(names)
        assert {one["verdict"] for one in members} == {"verified"}
        assert any(one["kind"] == "target" for one in members)
    assert {"peft", "transformers"} <= set(told["tool"])


@pytest.mark.parametrize("name", ["llama-all-seven", "llama-two-adapters"])
def test_the_two_variants_differ_in_their_arithmetic_in_half_precision(parity, name) -> None:
    found = variants(parity(name, "bf16")[2])
    said = {
        variant: {one["arithmetic"] for one in members if one["kind"] == "target"} for variant, members in found.items()
    }
    assert said == {"unsafe": {"fp32-add"}, "safe": {"rounded-delta"}}


def times(number: float):
    """PEFT's delta of a linear layer times a number."""
    honest = layer.Linear.get_delta_weight
    return lambda self, adapter: number * honest(self, adapter)


@pytest.mark.parametrize(("number", "code"), [(2.0, "LC102"), (-1.0, "LC103"), (1.25, "LC110"), (0.0, "LC101")])
def test_a_peft_with_another_scale_is_refuted_in_both_variants(parity, monkeypatch, number, code) -> None:
    monkeypatch.setattr(layer.Linear, "get_delta_weight", times(number))
    left, out, told = parity("llama-all-seven", "bf16")
    assert (left, told["verdict"]) == (1, "refuted")
    assert out.startswith("refuted: ")
    for members in variants(told).values():
        assert {one["verdict"] for one in members if one["kind"] == "target"} == {"refuted"}
        assert {one["verdict"] for one in members if one["kind"] != "target"} == {"verified"}
    found = [one for one in told["findings"] if one["code"] == code]
    assert [one["message"].partition(" merge: ")[0] for one in found] == ["unsafe", "safe"]
    monkeypatch.undo()
    assert parity("llama-all-seven", "bf16")[0] == 0


def test_a_peft_that_errs_in_one_variant_only_is_refuted_in_that_one(parity, monkeypatch) -> None:
    honest = layer.Linear.merge

    def merge(self, safe_merge=False, adapter_names=None) -> None:
        honest(self, safe_merge, adapter_names)
        if safe_merge:
            self.get_base_layer().weight.data.mul_(1.01)

    monkeypatch.setattr(layer.Linear, "merge", merge)
    code, _, told = parity("llama-qv", "fp32")
    assert code == 1
    words = {variant: {one["verdict"] for one in members} for variant, members in variants(told).items()}
    assert words == {"unsafe": {"verified"}, "safe": {"verified", "refuted"}}


def test_a_peft_that_ignores_the_magnitude_is_refuted_and_named(parity, monkeypatch) -> None:
    from peft.tuners.lora import variants as kinds

    def plain(module, active_adapter, orig_weight):
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def plainly(module, active_adapter, orig_weight) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    monkeypatch.setattr(kinds.DoraLinearVariant, "merge_safe", staticmethod(plain))
    monkeypatch.setattr(kinds.DoraLinearVariant, "merge_unsafe", staticmethod(plainly))
    code, _, told = parity("llama-dora", "bf16")
    assert code == 1
    assert {one["code"] for one in told["findings"]} == {"LC106"}


def test_the_markdown_and_the_text_tell_the_variants_apart(parity) -> None:
    assert "unsafe" in parity("llama-qv", "fp32", "--all")[1]
    assert "unsafe" in parity("llama-qv", "fp32", "--all", "--format", "markdown")[1]


@pytest.mark.parametrize("place", ["base", "adapter"])
def test_what_peft_cannot_load_is_told_in_one_sentence(world, tmp_path, capsys, place) -> None:
    inputs = world("llama-qv")
    empty = tmp_path / "nothing"
    empty.mkdir()
    given = [str(empty), inputs.argv[1]] if place == "base" else [inputs.argv[0], str(empty)]
    assert main(["parity", *given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]
    assert str(empty) in err


@pytest.mark.parametrize("url", ["https://host/model", "s3://models/one", "hf://org/name"])
def test_a_url_is_told_not_to_be_loaded(capsys, url) -> None:
    assert main(["parity", url, "adapter"]) == 2
    assert f"reads no URL such as {url}" in capsys.readouterr().err

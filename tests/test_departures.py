"""Where PEFT departs from itself: what base and adapter compute decides, and the releases are told."""

from __future__ import annotations

import json
from dataclasses import replace

import peft_worlds
import pytest
import torch
import tuner_worlds
from safetensors.torch import load_file

import lora_check
from lora_check.types import Verdict

WEIGHTS = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"


def codes(report: lora_check.Report) -> set[str]:
    return {one.code for one in report.findings if one.severity != "info"}


def said(report: lora_check.Report) -> str:
    return " ".join(one.message for one in report.findings)


def edited(save, load, folder, **changes: object):
    """A copy of a checkpoint whose config.json says something else; None takes a key away."""
    other = save(load(folder), folder)
    config = json.loads((other / "config.json").read_text()) | changes
    (other / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return other


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"], ["lm_head", "q_proj"]])
def test_a_tied_delta_belongs_into_the_shared_tensor_once(tmp_path, save, load, monkeypatch, targets) -> None:
    config = peft_worlds._lora(targets, ensure_weight_tying=True)
    recipe = peft_worlds._one(peft_worlds._llama(tie_word_embeddings=True), config, tied=peft_worlds._TIED)
    monkeypatch.setattr(peft_worlds, "RECIPES", {"tied": recipe})
    made = peft_worlds.build("tied", tmp_path, "fp32", safe=False)
    merged, adapters = made.merged["fp32", False], list(made.adapter_dirs)
    report = lora_check.check(made.base_dir, adapters, merged, jobs=1)
    assert report.verdict is Verdict.REFUTED
    assert [one.tensors for one in report.findings if one.code == "LC115"] == [(EMBEDDING,)]
    assert "PEFT 0.19 to 0.21" in said(report)
    before, after = load_file(made.base_dir / WEIGHTS), load_file(merged / WEIGHTS)
    once = {**after, EMBEDDING: (before[EMBEDDING] + after[EMBEDDING]) / 2}
    repaired = lora_check.check(made.base_dir, adapters, save(once, merged), jobs=1)
    wrong = [one for one in repaired.comparisons if one.verdict is Verdict.REFUTED]
    assert all(one.over_budget <= 2 for one in wrong)  # the middle of two stored numbers is rounded once more


def test_a_bias_without_its_scale_is_told_with_its_releases(world, save, load) -> None:
    inputs = world("linear-bias-lora")
    before, after = load(inputs.base), load(inputs.merged)
    factors = load(inputs.adapters[0])
    for module in ("fc0", "fc1"):
        name = f"{module}.bias"
        after[name] = before[name] + factors[f"base_model.model.{module}.lora_B.bias"]
    report = lora_check.check(inputs.base, inputs.adapters, save(after, inputs.merged), jobs=1)
    assert codes(report) == {"LC114"}
    assert "PEFT 0.14 and 0.15" in said(report)


def test_the_bias_of_ia3_left_out_is_told_with_its_releases(tmp_path, save, load) -> None:
    made = tuner_worlds.build("ia3", tmp_path, "fp32", safe=False)
    merged, adapters = made.merged["fp32", False], list(made.adapter_dirs)
    before, after = load(made.base_dir), load(merged)
    biases = {name: before[name] for name in after if name.endswith("bias")}
    assert all(not torch.equal(bias, after[name]) for name, bias in biases.items())
    report = lora_check.check(made.base_dir, adapters, save({**after, **biases}, merged), jobs=1)
    assert codes(report) == {"LC116"}
    assert "PEFT 0.4 and 0.5" in said(report)
    everything = save({**after, **biases, "fc0.weight": before["fc0.weight"]}, merged)
    assert "LC116" not in codes(lora_check.check(made.base_dir, adapters, everything, jobs=1))


def test_a_head_of_its_own_under_a_config_that_ties_it_is_refuted(world, save, load) -> None:
    inputs = world("llama-saved-head")
    assert lora_check.check(*inputs.args, jobs=1).verdict is Verdict.VERIFIED
    tied = edited(save, load, inputs.merged, tie_word_embeddings=True)
    report = lora_check.check(inputs.base, inputs.adapters, tied, jobs=1)
    assert report.verdict is Verdict.REFUTED
    assert codes(report) == {"LC210"}


def test_a_head_that_is_left_out_because_merged_ties_it_is_missing(world, save, load) -> None:
    inputs = world("llama-qv")
    whole = load(inputs.merged)
    del whole["lm_head.weight"]
    folder = save(whole, inputs.merged)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    report = lora_check.check(inputs.base, inputs.adapters, folder, jobs=1)
    assert report.verdict is Verdict.REFUTED
    assert {"LC201", "LC210"} <= codes(report)


def test_a_session_that_read_its_patterns_in_another_order_is_told(world, save, load) -> None:
    """The file sorts the patterns; the session that trained the adapter took `v_proj`, a reload takes the regex."""
    inputs = world("llama-patterns")
    base, factors, merged = load(inputs.base), load(inputs.adapters[0]), load(inputs.merged)
    name = "model.layers.1.self_attn.v_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")

    def with_alpha(alpha: float) -> lora_check.Report:
        weight = (base[f"{name}.weight"].double() + alpha / len(a) * (b @ a)).float()
        other = save({**merged, f"{name}.weight": weight}, inputs.merged)
        return lora_check.check(inputs.base, inputs.adapters, other, jobs=1)

    report = with_alpha(11)
    assert report.verdict is Verdict.VERIFIED, said(report)
    told = [(one.code, one.tensors) for one in report.findings if one.code != "LC315"]
    assert told == [("LC308", (f"{name}.weight",))]
    assert "session" in said(report)
    assert {one.code for one in with_alpha(8).findings} <= {"LC315"}
    assert with_alpha(12).verdict is Verdict.REFUTED


def test_two_dora_adapters_are_named_with_the_releases_that_differ(world, tmp_path) -> None:
    inputs = world("llama-dora")
    report = lora_check.check(inputs.base, [*inputs.adapters, *inputs.adapters], inputs.merged, jobs=1)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "0.12 to 0.20" in said(report)


def test_a_layer_that_several_layers_share_is_named(world, save, load) -> None:
    inputs = world("llama-qv")
    adapter = save(load(inputs.adapters[0]), inputs.adapters[0], "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "layer_replication": [[0, 2], [1, 2]]}))
    report = lora_check.check(*replace(inputs, adapters=(adapter,)).args, jobs=1)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "layer_replication" in said(report)

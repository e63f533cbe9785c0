"""Names and pieces: what is renamed, stacked, fused, cut or turned over is paired, or told to be unpaired."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import layout_worlds
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lora_check
from lora_check.types import Verdict

WEIGHTS = "model.safetensors"
Files = tuple[Path, Path, Path]

# PEFT asks transformers for a deprecated attribute, and says that it corrects targets.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Files]:
    root = tmp_path_factory.mktemp("layout-worlds")
    return lambda name, dtype="bf16": layout_worlds.build(name, root, dtype)


def as_loaded(name: str, folder: Path, out: Path) -> Path:
    """The same model under the names that it has in memory."""
    model = getattr(transformers, layout_worlds.RECIPES[name].model).from_pretrained(folder, dtype=torch.bfloat16)
    out.mkdir()
    save_file({key: value.contiguous().clone() for key, value in model.state_dict().items()}, out / WEIGHTS)
    shutil.copy(folder / "config.json", out)
    return out


@pytest.mark.parametrize("case", layout_worlds.cases(), ids="-".join)
def test_a_merge_by_peft_is_verified_bit_for_bit(made, case) -> None:
    report = lora_check.check(*made(*case), jobs=1)
    assert report.verdict is Verdict.VERIFIED, [one.message for one in report.findings]
    assert any(one.kind == "target" for one in report.comparisons)
    assert all(one.exact for one in report.comparisons)


@pytest.mark.parametrize("name", layout_worlds.RECIPES)
def test_a_target_that_holds_the_base_is_refuted(made, save, name) -> None:
    base, adapter, merged = made(name)
    before, after = load_file(base / WEIGHTS), load_file(merged / WEIGHTS)
    report = lora_check.check(base, adapter, merged, jobs=1)
    targets = [one.tensor for one in report.comparisons if one.kind == "target"]
    last = targets[-1]
    spoiled = lora_check.check(base, adapter, save({**after, last: before[last]}, merged), jobs=1)
    assert [one.tensor for one in spoiled.comparisons if one.verdict is Verdict.REFUTED] == [last]


def test_an_adapter_with_the_names_of_an_older_release_finds_its_modules(made, save, tmp_path) -> None:
    """Before transformers 4.52 the language model of a LLaVA was not inside `model`."""
    base, adapter, merged = made("llava")
    new, old = "base_model.model.model.language_model.", "base_model.model.language_model.model."
    factors = load_file(adapter / "adapter_model.safetensors")
    renamed = save({key.replace(new, old): one for key, one in factors.items()}, adapter, "adapter_model.safetensors")
    loaded = as_loaded("llava", base, tmp_path / "base"), as_loaded("llava", merged, tmp_path / "merged")
    for one, other in ((base, merged), loaded):
        report = lora_check.check(one, renamed, other, jobs=1)
        assert report.verdict is Verdict.VERIFIED, [finding.message for finding in report.findings]
        assert len([comparison for comparison in report.comparisons if comparison.kind == "target"]) == 4


@pytest.mark.parametrize("name", ["llava", "mixtral", "qwen3-moe", "vit"])
def test_files_and_memory_are_paired_both_ways(made, tmp_path, name) -> None:
    base, adapter, merged = made(name)
    loaded = as_loaded(name, base, tmp_path / "base"), as_loaded(name, merged, tmp_path / "merged")
    assert set(load_file(base / WEIGHTS)) != set(load_file(loaded[0] / WEIGHTS))
    for one, other in ((base, loaded[1]), (loaded[0], merged), loaded):
        report = lora_check.check(one, adapter, other, jobs=1)
        assert report.verdict is Verdict.VERIFIED, [finding.message for finding in report.findings]
        assert all(comparison.exact for comparison in report.comparisons)
        assert sorted(comparison.tensor for comparison in report.comparisons) == sorted(load_file(other / WEIGHTS))
    refuted = lora_check.check(base, adapter, loaded[0], jobs=1)
    assert {finding.code for finding in refuted.findings if finding.severity == "error"} == {"LC101"}


def test_swapped_experts_are_refuted(made, save) -> None:
    base, adapter, merged = made("mixtral")
    after = load_file(merged / WEIGHTS)
    first, second = (f"model.layers.0.block_sparse_moe.experts.{index}.w1.weight" for index in (0, 1))
    swapped = save({**after, first: after[second], second: after[first]}, merged)
    report = lora_check.check(base, adapter, swapped, jobs=1)
    assert [one.tensor for one in report.comparisons if one.verdict is Verdict.REFUTED] == [first, second]


def test_a_square_stack_of_an_older_release_is_verified_and_told(made, save) -> None:
    """PEFT 0.17 and 0.18 read every stack as (experts, in, out)."""
    base, adapter, merged = made("gpt-oss-square", "fp32")
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    before, after = load_file(base / WEIGHTS), load_file(merged / WEIGHTS)
    module = "model.layers.0.mlp.experts"
    a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    name = f"{module}.down_proj"
    experts = before[name].shape[0]
    a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts)
    turned = torch.einsum("ore,eri->eoi", b, a) * config["lora_alpha"] / config["r"]
    other = save({**after, name: (before[name].double() + turned).float()}, merged)
    assert lora_check.check(base, adapter, other, jobs=1).verdict is Verdict.REFUTED  # the adapter names its release
    del config["peft_version"]
    unnamed = save(factors, adapter, "adapter_model.safetensors")
    (unnamed / "adapter_config.json").write_text(json.dumps(config))
    report = lora_check.check(base, unnamed, other, jobs=1)
    assert report.verdict is Verdict.VERIFIED
    assert [(one.code, one.tensors) for one in report.findings if one.severity != "info"] == [("LC308", (name,))]


def fused(folder: Path, out: Path) -> Path:
    """Query, key and value in one tensor, gate and up in another, as vLLM keeps them."""
    state = load_file(folder / WEIGHTS)
    for parts, whole in ((("q_proj", "k_proj", "v_proj"), "qkv_proj"), (("gate_proj", "up_proj"), "gate_up_proj")):
        for key in [key for key in state if f".{parts[0]}." in key]:
            joined = torch.cat([state.pop(key.replace(parts[0], part)) for part in parts])
            state[key.replace(parts[0], whole)] = joined
    out.mkdir()
    save_file(state, out / WEIGHTS)
    shutil.copy(folder / "config.json", out)
    return out


def test_fused_and_split_projections_are_paired(world, tmp_path) -> None:
    inputs = world("llama-all-seven", "bf16")
    base, merged = fused(inputs.base, tmp_path / "base"), fused(inputs.merged, tmp_path / "merged")
    for one, other in ((inputs.base, merged), (base, inputs.merged), (base, merged)):
        report = lora_check.check(one, inputs.adapters, other, jobs=1)
        assert report.verdict is Verdict.VERIFIED, [finding.message for finding in report.findings]
        assert all(comparison.exact for comparison in report.comparisons)
    refuted = lora_check.check(inputs.base, inputs.adapters, base, jobs=1)
    assert {finding.code for finding in refuted.findings if finding.severity == "error"} == {"LC101"}


def test_rows_beside_the_adapted_ones_are_bystanders(world, tmp_path, save) -> None:
    inputs = world("llama-qv", "fp32")
    base, merged = fused(inputs.base, tmp_path / "base"), fused(inputs.merged, tmp_path / "merged")
    state = load_file(merged / WEIGHTS)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert lora_check.check(base, inputs.adapters, merged, jobs=1).verdict is Verdict.VERIFIED
    state[name][33, 0] += 1e-6  # a row of k, which no adapter touches
    report = lora_check.check(base, inputs.adapters, save(state, merged), jobs=1)
    assert [one.tensor for one in report.comparisons if one.verdict is Verdict.REFUTED] == [name]


def test_names_that_cannot_be_paired_are_inconclusive_with_the_closest(world, save, load) -> None:
    inputs = world("llama-qv")
    renamed = {name.replace("self_attn", "attention"): tensor for name, tensor in load(inputs.merged).items()}
    report = lora_check.check(inputs.base, inputs.adapters, save(renamed, inputs.merged), jobs=1)
    assert (report.verdict, report.exit_code) == (Verdict.INCONCLUSIVE, 3)
    found = next(one for one in report.findings if one.code == "LC209")
    assert "cannot pair" in found.message
    assert all(ours.replace("self_attn", "attention") == theirs for ours, theirs in found.evidence["closest"].items())
    assert not {"LC101", "LC201", "LC202"} & {one.code for one in report.findings}


def test_a_healthy_check_never_imports_transformers(world) -> None:
    inputs = world("llama-qv")
    script = (
        "import sys, lora_check; report = lora_check.check(*sys.argv[1:]); "
        "print(report.verdict.value, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, *inputs.argv], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["verified", "False"]

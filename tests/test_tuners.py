"""Hold the checker against live PEFT for every tuner: an honest merge is verified, whatever is changed in it is not."""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import tuner_worlds
from safetensors.torch import load_file
from torch import Tensor

import lora_check
from lora_check.adapters.methods import UNMERGEABLE, why_not
from lora_check.types import Verdict

Files = tuple[Path, list[Path], Path]

REGIMES = (("fp32", False), ("bf16", False), ("bf16", True))  # in fp32 safe_merge writes the same bits
NAMED: Mapping[str, str] = {
    "frod-seeded": "signs left to chance",
    "tinylora-seeded": "do not tell the order of the modules",
    "two-dora": "several adapters with a DoRA one",
    "unilora": "save_indices is off",
    "unilora-conv1d-t": "save_indices is off",
    "unilora-square": "save_indices is off",
}
"""Worlds whose merge the files do not decide -> the reason that LC301 tells."""

UNREAD: Mapping[str, str] = {
    "glora-constant": r"\.zeros$",
    "glora-no-bias": r"\.zeros$",
    "glora-none": r"\.zeros$",
    "lora-monte": "sampler",
    "lora-velora": "velora_embed",
    "tokens-tied": "embed_tokens",  # PEFT takes the tied head's rows, which are the same
}
"""Worlds with adapter tensors that PEFT does not read in a merge -> their names."""

UNCHANGED = ("glora-none",)
"""Worlds with a target whose delta is zero by its configuration."""

LOOSE = ("lora-kasa", "osf-rank", "psoft-lowrank")
"""Worlds whose matrices have singular values so close together that the budget is a good part of the delta."""

WEIGHTS = "model.safetensors"
FACTORS = "adapter_model.safetensors"
SHIFT = 0.05  # of a tensor's own size: far above every budget, far below what would change a verdict's kind


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Files]:
    root = tmp_path_factory.mktemp("tuner-worlds")

    def get(name: str, dtype: str = "fp32", safe: bool = False) -> Files:
        world = tuner_worlds.build(name, root, dtype, safe)
        return world.base_dir, list(world.adapter_dirs), world.merged[dtype, safe]

    return get


@pytest.mark.parametrize("name", tuner_worlds.names())
def test_a_merge_by_peft_is_verified_or_named(made, name) -> None:
    for dtype, safe in REGIMES:
        report = lora_check.check(*made(name, dtype, safe), jobs=1)
        errors = [one.message for one in report.findings if one.severity == "error"]
        assert errors == [], (dtype, safe)
        if name in NAMED:
            reasons = [one.message for one in report.findings if one.code == "LC301"]
            assert report.verdict is Verdict.INCONCLUSIVE
            assert any(re.search(NAMED[name], reason) for reason in reasons), reasons
        else:
            assert report.verdict is Verdict.VERIFIED, [one.message for one in report.findings]
            assert any(one.kind != "bystander" for one in report.comparisons)
            untouched_targets = [one for one in untouched(report, made(name, dtype, safe)) if one.kind != "bystander"]
            assert untouched_targets == [] or name in UNCHANGED


def untouched(report: lora_check.Report, files: Files) -> list:
    """Comparisons of tensors in which the merge left every bit of the base."""
    before, after = load_file(files[0] / WEIGHTS), load_file(files[2] / WEIGHTS)
    return [one for one in report.comparisons if one.tensor in before and same(before, after, one.tensor)]


def same(before: Mapping[str, Tensor], after: Mapping[str, Tensor], name: str) -> bool:
    return before[name].shape == after[name].shape and torch.equal(before[name], after[name])


@pytest.mark.parametrize("name", [name for name in tuner_worlds.names() if name not in NAMED])
def test_a_changed_target_is_refuted(made, load, save, name) -> None:
    """One target gets the base back, or a delta a twentieth too large; where the budget is wide, twice as large.

    A budget as large as the delta refutes nothing, and verifies nothing either.
    """
    base, adapters, folder = made(name)
    before, after = load(base), load(folder)
    report = lora_check.check(base, adapters, folder, jobs=1)
    target = next(one.tensor for one in report.comparisons if one.kind != "bystander" and one.tensor in before)
    step = 1.0 if name in LOOSE else SHIFT
    changes = {"base": before[target], "larger": after[target] + step * (after[target] - before[target])}
    for word, changed in changes.items():
        if changed.shape == after[target].shape and not torch.equal(changed, after[target]):
            spoiled = lora_check.check(base, adapters, save({**after, target: changed}, folder), jobs=1)
            if name in LOOSE:
                assert spoiled.verdict is not Verdict.VERIFIED, word
                continue
            assert spoiled.verdict is Verdict.REFUTED, word
            assert [one.tensor for one in spoiled.comparisons if one.verdict is Verdict.REFUTED] == [target], word


@pytest.mark.parametrize("name", [name for name in tuner_worlds.names() if name not in NAMED])
def test_every_tensor_of_the_adapter_file_is_read(made, save, name) -> None:
    base, adapters, folder = made(name)
    factors, shift = load_file(adapters[0] / FACTORS), 1.0 if name in LOOSE else SHIFT
    torch.manual_seed(zlib.crc32(name.encode()))
    for key, tensor in factors.items():
        if tensor.is_floating_point() and not re.search(UNREAD.get(name, "(?!)"), key):
            size = tensor.float().std(unbiased=False).clamp_min(tensor.float().abs().mean())
            changed = {**factors, key: tensor + (shift * size * torch.randn(tensor.shape)).to(tensor.dtype)}
            other = save(changed, adapters[0], FACTORS)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert not verified(base, [other, *adapters[1:]], folder), key


def verified(*files: object) -> bool:
    """Whether it is; copies of one tensor that disagree are refused before anything is compared."""
    try:
        return lora_check.check(*files, jobs=1).verdict is Verdict.VERIFIED
    except lora_check.LoraCheckError:
        return False


@pytest.mark.parametrize("name", UNMERGEABLE)
def test_what_no_release_merges_is_told_by_its_type(name: str) -> None:
    assert why_not({}, name) == [f"adapters of type {name} cannot be merged: {UNMERGEABLE[name]}"]

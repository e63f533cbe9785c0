"""What PEFT's add_weighted_adapter makes of several adapters is verified by its kind, and by no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle_tuners.combinations as oracle
import peft_worlds
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_check
from lora_check.__main__ import main
from lora_check.types import Verdict

RANK = 4
WEIGHTS = (0.7, 1.3)
TYPES = torch.float32, torch.bfloat16

Files = tuple[Path, list[Path], Path]

# PEFT says of each Conv1D that it corrects the configuration, and of embeddings that it saves them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Layers(nn.Module):
    """One of each kind of layer that LoRA combines, none square but `even`."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(14, 20)
        self.even = nn.Linear(16, 16)
        self.turned = Conv1D(18, 11)
        self.emb = nn.Embedding(30, 12)
        self.conv = nn.Conv2d(5, 7, 3)


def model() -> Layers:
    torch.manual_seed(1)
    layers = Layers()
    for parameter in layers.parameters():
        parameter.data.copy_(0.05 * torch.randn_like(parameter))
    return layers


def lora(index: int, **changes: Any) -> LoraConfig:
    targets = ["wide", "even", "turned", "emb", "conv"] if index else ["wide", "even", "turned", "emb"]
    return LoraConfig(r=RANK, lora_alpha=(7, 10)[index], target_modules=targets, **changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Files]:
    """(kind, dtype, and what is said besides) -> base, adapters, merged; `loading` and `options` are for PEFT."""
    root = tmp_path_factory.mktemp("combinations")

    def get(
        kind: str,
        dtype=torch.float32,
        weights=WEIGHTS,
        safe=False,
        changes=None,
        files=torch.float32,
        loading=None,
        **options: Any,
    ) -> Files:
        loading = loading or {}
        home = root / str(len(list(root.iterdir())))
        adapters = [home / f"adapter{index}" for index in range(2)]
        layers = model().to(dtype)
        peft_worlds._save_plain(layers, home / "base")
        for index, folder in enumerate(adapters):
            tuned = get_peft_model(model(), lora(index, **(changes or {})))
            torch.manual_seed(index)
            for name, parameter in tuned.named_parameters():
                if "lora_" in name:
                    parameter.data.copy_(0.2 * torch.randn_like(parameter))
            tuned.to(files).save_pretrained(folder)
        tuned = PeftModel.from_pretrained(model().to(dtype), adapters[0], adapter_name="one", **loading)
        tuned.load_adapter(adapters[1], adapter_name="two", **loading)
        tuned.add_weighted_adapter(["one", "two"], list(weights), "both", combination_type=kind, **options)
        tuned.set_adapter("both")
        peft_worlds._save_plain(tuned.merge_and_unload(safe_merge=safe), home / "merged")
        return home / "base", adapters, home / "merged"

    return get


KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {},
    "svd:svd_rank=6": {"svd_rank": 6},
    "ties:density=0.5": {"density": 0.5},
    "ties:density=0.6,majority_sign_method=frequency": {"density": 0.6, "majority_sign_method": "frequency"},
    "ties_svd:density=0.5": {"density": 0.5},
    "magnitude_prune:density=0.4": {"density": 0.4},
    "magnitude_prune_svd:density=0.4": {"density": 0.4},
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_combination_by_peft_is_verified_as_that_kind(made, kind, dtype) -> None:
    base, adapters, merged = made(kind.partition(":")[0], dtype, **KINDS[kind])
    report = lora_check.check(base, adapters, merged, weights=WEIGHTS, combination=kind, jobs=1)
    assert report.verdict is Verdict.VERIFIED, [one.message for one in report.findings]
    assert len([one for one in report.comparisons if one.kind == "target"]) == 5
    other = "linear" if kind == "cat" else "cat"
    report = lora_check.check(base, adapters, merged, weights=WEIGHTS, combination=other, jobs=1)
    assert report.verdict is Verdict.REFUTED
    report = lora_check.check(base, adapters, merged, weights=WEIGHTS[::-1], combination=kind, jobs=1)
    assert report.verdict is Verdict.REFUTED


AS_STORED = {"autocast_adapter_dtype": False}
HELD = {
    "bf16": (torch.bfloat16, torch.float32, False),
    "bf16-safe": (torch.bfloat16, torch.float16, True),
    "fp16": (torch.float16, torch.bfloat16, False),
    "fp32": (torch.float32, torch.bfloat16, False),
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "rank" not in kind and "method" not in kind])
def test_adapters_held_in_the_dtype_of_the_model_are_combined_in_it(made, kind, held) -> None:
    dtype, files, safe = HELD[held]
    name = kind.partition(":")[0]
    base, adapters, merged = made(name, dtype, safe=safe, files=files, loading=AS_STORED, **KINDS[kind])
    report = lora_check.check(base, adapters, merged, weights=WEIGHTS, combination=kind, jobs=1)
    assert report.verdict is Verdict.VERIFIED, [one.message for one in report.findings]
    arithmetic = {one.arithmetic for one in report.comparisons if one.kind == "target"}
    cut = "" if safe or not name.endswith("svd") else "-add"
    assert arithmetic == ({"fp32-add"} if dtype is torch.float32 else {f"combined-in-storage{cut}"})
    report = lora_check.check(base, adapters, merged, weights=WEIGHTS[::-1], combination=kind, jobs=1)
    assert report.verdict is Verdict.REFUTED


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_products_that_a_gpu_leaves_in_16_bits_are_verified(made, save, kind) -> None:
    """rsLoRA: the new scale is the root of the rank, so a product that is stored before it is scaled shows."""
    base, adapters, merged = made(kind, torch.bfloat16, changes={"use_rslora": True}, loading=AS_STORED)
    after, before = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
    factors = [load_file(folder / "adapter_model.safetensors") for folder in adapters]
    for module in ("wide", "even"):
        a, b = ([one[f"base_model.model.{module}.lora_{side}.weight"] for one in factors] for side in "AB")
        scales = [alpha / RANK**0.5 for alpha in (7, 10)]
        delta = {"cat": by_rows, "svd": by_cutting}[kind](
            [stored(one) for one in a], [stored(one) for one in b], scales
        )
        after[f"{module}.weight"] = (before[f"{module}.weight"].double() + delta).bfloat16()
    report = lora_check.check(base, adapters, save(after, merged), weights=WEIGHTS, combination=kind, jobs=1)
    seen = [one for one in report.comparisons if one.tensor in ("wide.weight", "even.weight")]
    assert {one.verdict for one in seen} == {Verdict.VERIFIED}
    assert {one.arithmetic for one in seen} == {{"svd": "combined-products", "cat": "combined-in-storage-matmul"}[kind]}
    after["wide.weight"][3, 5] *= 1.25
    report = lora_check.check(base, adapters, save(after, merged), weights=WEIGHTS, combination=kind, jobs=1)
    assert report.verdict is Verdict.REFUTED


def stored(x: torch.Tensor) -> torch.Tensor:
    """What bf16 keeps of it, in float64."""
    return x.to(torch.bfloat16).double()


def by_rows(a: list, b: list, scales: list) -> torch.Tensor:
    rows = [stored(stored(one * weight) * s) for one, weight, s in zip(a, WEIGHTS, scales, strict=True)]
    return stored(stored(torch.cat(b, 1) @ torch.cat(rows)) * (2 * RANK) ** 0.5)


def by_cutting(a: list, b: list, scales: list) -> torch.Tensor:
    deltas = [stored(stored(left @ right) * s) for left, right, s in zip(b, a, scales, strict=True)]
    u, s, vt = torch.linalg.svd(sum(one * weight for one, weight in zip(deltas, WEIGHTS, strict=True)))
    return (u[:, :RANK] * s[:RANK]) @ vt[:RANK] * RANK**0.5


@pytest.mark.parametrize("kind", ["ties:density=0.5", "magnitude_prune:density=0.4", "magnitude_prune_svd:density=0.4"])
def test_which_of_equal_numbers_stays_is_the_machines_choice(made, monkeypatch, kind) -> None:
    """Of 16-bit numbers many are equal: a merge that kept the first of them is not refuted, and a wrong one is."""

    def first(x: torch.Tensor, k: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = x.sort(descending=largest, stable=True).indices[:k]
        return x[chosen], chosen

    monkeypatch.setattr(torch, "topk", first)
    base, adapters, merged = made(kind.partition(":")[0], torch.bfloat16, loading=AS_STORED, **KINDS[kind])
    report = lora_check.check(base, adapters, merged, weights=WEIGHTS, combination=kind, jobs=1)
    assert report.verdict is not Verdict.REFUTED, [one.message for one in report.findings]
    report = lora_check.check(base, adapters, merged, weights=WEIGHTS[::-1], combination=kind, jobs=1)
    assert report.verdict is Verdict.REFUTED


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_negative_weights_and_rslora(made, kind) -> None:
    weights = (0.7, -1.3)
    changes = {"use_rslora": True}
    base, adapters, merged = made(kind, weights=weights, changes=changes)
    report = lora_check.check(base, adapters, merged, weights=weights, combination=kind, jobs=1)
    assert report.verdict is Verdict.VERIFIED, [one.message for one in report.findings]
    report = lora_check.check(base, adapters, merged, weights=(0.7, 1.3), combination=kind, jobs=1)
    assert report.verdict is Verdict.REFUTED


@pytest.mark.parametrize("release", [(0, 6), (0, 8), (0, 18), (0, 20)], ids=str)
def test_what_older_releases_wrote_is_verified_and_told(made, save, release) -> None:
    kind, weights = ("svd", WEIGHTS) if release == (0, 20) else ("linear", (0.7, -1.3 if release == (0, 18) else 1.3))
    base, adapters, merged = made(kind, weights=weights)
    after, before = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
    factors = [load_file(folder / "adapter_model.safetensors") for folder in adapters]
    for module in ("wide", "even"):
        names = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
        parts = [
            oracle.Part(one[names[0]].double().numpy(), one[names[1]].double().numpy(), alpha / RANK, weight)
            for one, alpha, weight in zip(factors, (7, 10), weights, strict=True)
        ]
        a, b = oracle.combine(kind, parts, oracle.Options(rank=RANK), release)
        after[f"{module}.weight"] = (before[f"{module}.weight"].double() + torch.from_numpy(b @ a)).float()
    report = lora_check.check(base, adapters, save(after, merged), weights=weights, combination=kind, jobs=1)
    assert report.verdict is Verdict.VERIFIED, [one.message for one in report.findings]
    told = [one for one in report.findings if one.code == "LC308"]
    assert {name for one in told for name in one.tensors} == {"wide.weight", "even.weight"}


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_what_is_dropped_at_random_is_named(made, kind) -> None:
    base, adapters, merged = made(kind, density=0.5)
    report = lora_check.check(base, adapters, merged, weights=WEIGHTS, combination=kind, jobs=1)
    assert (report.verdict, report.exit_code) == (Verdict.INCONCLUSIVE, 3)
    assert any("random" in one.message for one in report.findings if one.code == "LC301")


@pytest.mark.parametrize(
    ("kind", "said"),
    [("wild", "no combination"), ("ties:density=much", "no float"), ("svd:rank=3", "no option 'rank'")],
)
def test_an_impossible_combination_is_one_sentence(made, kind, said, capsys) -> None:
    base, adapters, merged = made("linear")
    arguments = ["report", str(base), *map(str, adapters), str(merged), "--combination", kind]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_what_is_not_combined_is_named(made, save) -> None:
    base, adapters, merged = made("cat")
    factors = load_file(adapters[0] / "adapter_model.safetensors")
    with_more = {**factors, "base_model.model.conv.bias": torch.ones(7)}
    other = save(with_more, adapters[0], "adapter_model.safetensors")
    report = lora_check.check(base, [other, adapters[1]], merged, weights=WEIGHTS, combination="cat", jobs=1)
    assert report.verdict is Verdict.INCONCLUSIVE
    save_file(factors, other / "adapter_model.safetensors")

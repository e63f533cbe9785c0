"""One release of PEFT at a time, every tuner it has: what it trains, saves, reloads and merges is verified or named.

Only names that PEFT 0.4 and transformers 4.35 already have are used without asking, so that one file serves every row
of tox.ini. With LORA_CHECK_COMPATIBILITY set to a folder, what was seen is appended there, a line for each case.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_check
from lora_check.types import Verdict

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # escapes that Python 3.11 frowns upon in releases of its youth
    import peft

pytestmark = pytest.mark.filterwarnings("default")  # old libraries warn about each other

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = ["k_proj", "down_proj"]
SIZE = 0.3
"""What a trained number moves by, against its own spread, or in itself where it starts at a constant."""


@dataclasses.dataclass(frozen=True)
class Tuner:
    """The class of its configuration, and what it is told; what a release does not know is left out."""

    config: str
    told: Mapping[str, Any]
    needs: str = ""  # a field without which this release has no such thing
    noise: float = 0.05


def _lora(**changes: Any) -> Tuner:
    told = {"r": 6, "lora_alpha": 10, "lora_dropout": 0.0, "target_modules": TARGETS, **changes}
    return Tuner("LoraConfig", told, needs=next((key for key in changes if key != "target_modules"), ""))


def _tuner(config: str, noise: float = 0.05, **told: Any) -> Tuner:
    return Tuner(config, {"target_modules": TARGETS, **told}, noise=noise)


TUNERS: Mapping[str, Tuner] = {
    "lora": _lora(),
    "lora-embedding": _lora(target_modules=["embed_tokens", "k_proj"]),
    "lora-rslora": _lora(use_rslora=True),
    "lora-patterns": _lora(rank_pattern={"down_proj": 4}, alpha_pattern={"k_proj": 7}),
    "lora-dora": _lora(use_dora=True),
    "lora-bias": _lora(lora_bias=True, target_modules=["k_proj"]),
    "lora-tokens": _lora(trainable_token_indices={"embed_tokens": [2, 7, 31]}),
    "lora-saved": _lora(modules_to_save=["lm_head"]),
    "lora-experts": _lora(target_parameters=["mlp.down_proj.weight"], target_modules=[]),
    "adalora": _tuner("AdaLoraConfig", lora_dropout=0.05, init_r=6, target_r=3, lora_alpha=10, total_step=10),
    "ia3": _tuner("IA3Config", feedforward_modules=["down_proj"]),
    "loha": _tuner("LoHaConfig", noise=0.2, r=3, alpha=7),
    "lokr": _tuner("LoKrConfig", r=3, alpha=7),
    "oft": _tuner("OFTConfig", r=4, oft_block_size=0),
    "oft-by-block": Tuner(
        "OFTConfig", {"oft_block_size": 4, "r": 0, "target_modules": TARGETS}, needs="oft_block_size"
    ),
    "boft": _tuner("BOFTConfig", boft_block_size=4),
    "hra": _tuner("HRAConfig", r=4),
    "vera": _tuner("VeraConfig", r=6),
    "vblora": _tuner("VBLoRAConfig", noise=0.2, r=3, num_vectors=12, vector_length=4, topk=2),
    "fourierft": _tuner("FourierFTConfig", noise=0.3, n_frequency=40, scaling=150.0),
    "waveft": _tuner("WaveFTConfig", noise=0.05, n_frequency=40, scaling=25.0),
    "c3a": _tuner("C3AConfig", noise=0.3, block_size=4),
    "randlora": _tuner("RandLoraConfig", r=4, randlora_alpha=8),
    "shira": _tuner("ShiraConfig", r=3),
    "miss": _tuner("MissConfig", r=4),
    "miss-bat": _tuner("MissConfig", r=4, init_weights="bat"),
    "bone": _tuner("BoneConfig", r=4),
    "bone-bat": _tuner("BoneConfig", r=4, init_weights="bat"),
    "road": _tuner("RoadConfig", group_size=4),
    "delora": _tuner("DeloraConfig", r=3, delora_lambda=0.5),
    "gralora": _tuner("GraloraConfig", r=4, alpha=6, gralora_k=2),
    "psoft": _tuner("PsoftConfig", r=4, psoft_alpha=6),
    "peanut": _tuner("PeanutConfig", r=3),
    "tinylora": _tuner("TinyLoraConfig", r=3, u=5),
    "pvera": _tuner("PveraConfig", r=6),
    "osf": _tuner("OSFConfig"),
    "hira": _tuner("HiraConfig", r=3),
    "frod": _tuner("FrodConfig"),
    "deft": _tuner("DeftConfig", r=3),
    "glora": _tuner("GloraConfig", r=3),
    "unilora": _tuner("UniLoraConfig", r=3, theta_d_length=64, save_indices=True),
    "adamss": _tuner("AdamssConfig", r=8, num_subspaces=2),
    "supertuning": _tuner("SupertuningConfig", sparsity=0.8),
    "ln-tuning": Tuner("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "tokens": Tuner("TrainableTokensConfig", {"target_modules": ["embed_tokens"], "token_indices": [2, 7, 31]}),
}

NAMED: Mapping[str, tuple[tuple[int, int], tuple[int, int], str]] = {
    "ia3": ((0, 4), (0, 5), "LC116"),
    "lora-bias": ((0, 14), (0, 15), "LC114"),
    "adamss": ((0, 19), (0, 19), "LC301"),
    "frod bf16": ((0, 20), (0, 21), "LC301"),
    "tinylora": ((0, 19), (0, 19), "LC301"),
}
"""Tuner, or tuner and dtype -> first and last release whose merge is not verified, and the code that says why."""

RAISES: Mapping[str, tuple[tuple[int, int], tuple[int, int], str]] = {
    "loha bf16": ((0, 6), (0, 6), "safe_merge"),
    "lokr bf16": ((0, 6), (0, 6), "safe_merge"),
    "lora-embedding bf16": ((0, 6), (0, 8), "has no attribute 'copy'"),
    "boft bf16": ((0, 11), (0, 15), "same dtype"),
    "hra bf16": ((0, 12), (0, 15), "same dtype"),
    "oft bf16": ((0, 7), (0, 15), "same dtype"),
    "oft-by-block bf16": ((0, 14), (0, 15), "same dtype"),
    "bone-bat bf16": ((0, 14), (0, 15), "expected scalar type"),
    "vera fp32": ((0, 11), (0, 11), "single dimension size"),
    "vera bf16": ((0, 11), (0, 11), "single dimension size"),
}
"""Tuner and dtype -> the first and the last release that cannot merge it, and what PEFT or torch then says."""


def release() -> tuple[int, int]:
    major, minor, *_ = version("peft").split(".")
    return int(major), int(minor)


def in_range(table: Mapping[str, tuple[tuple[int, int], tuple[int, int], str]], name: str) -> str:
    first, last, reason = table.get(name, ((9, 9), (0, 0), ""))
    return reason if first <= release() <= last else ""


def available(tuner: Tuner) -> bool:
    config = getattr(peft, tuner.config, None)
    return config is not None and (not tuner.needs or tuner.needs in _fields(config))


def _fields(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
            **({"attention_bias": True} if "attention_bias" in inspect.signature(LlamaConfig).parameters else {}),
        )
    )


def load(folder: Path, dtype: str) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(3)
    return LlamaForCausalLM.from_pretrained(str(folder)).to(DTYPES[dtype])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """One base in each dtype, no tensor of it constant."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    root, model = tmp_path_factory.mktemp("bases"), llama()
    for parameter in model.parameters():
        parameter.data.copy_(0.05 * torch.randn_like(parameter) + (1 if parameter.ndim == 1 else 0))
    found = {}
    for name, dtype in DTYPES.items():
        found[name] = root / name
        model.to(dtype).save_pretrained(str(found[name]))
    return found


def train(tuner: Tuner, base: Path, out: Path) -> Path:
    """An adapter with every trained number moved, as PEFT saves it; made once."""
    if out.exists():
        return out
    config = getattr(peft, tuner.config)
    told = {key: value for key, value in tuner.told.items() if key in _fields(config)}
    model = peft.get_peft_model(load(base, "fp32"), config(task_type="CAUSAL_LM", **told))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad and one.is_floating_point()):
            spread = parameter.std().item() if parameter.numel() > 1 else 0.0
            parameter.add_(max(SIZE * spread, tuner.noise) * torch.randn_like(parameter))
    model.save_pretrained(str(out))
    return out


def merge(base: Path, adapter: Path, out: Path, dtype: str, *, safe: bool) -> Path:
    """Load base and adapter afresh, merge, save; the folder of the merged model."""
    model = peft.PeftModel.from_pretrained(load(base, dtype), str(adapter))
    model.eval()
    merged = model.merge_and_unload(**({"safe_merge": True} if safe else {}))
    for parameter in merged.parameters():
        parameter.data = parameter.data.contiguous()  # OFT up to 0.12 leaves a transposed view, which cannot be saved
    merged.save_pretrained(str(out))
    return out


def can_merge_safely(tuner: Tuner) -> bool:
    return "safe_merge" in inspect.signature(peft.tuners.lora.LoraModel.merge_and_unload).parameters


def regimes(tuner: Tuner) -> list[tuple[str, bool]]:
    return [("fp32", False), ("bf16", False), *([("bf16", True)] if can_merge_safely(tuner) else [])]


def seen(name: str, dtype: str, safe: bool, report: lora_check.Report | None, raised: str = "") -> None:
    """Write down one case, where somebody asked for it."""
    targets = [one for one in report.comparisons if one.kind != "bystander"] if report else []
    line = {
        "peft": version("peft"),
        "transformers": version("transformers"),
        "tuner": name,
        "dtype": dtype,
        "safe": safe,
        "verdict": report.verdict.value if report else "raised",
        "targets": len(targets),
        "exact": sum(one.exact for one in targets),
        "arithmetic": sorted({one.arithmetic for one in targets if one.arithmetic}),
        "release": sorted({one.release for one in targets if one.release}),
        "findings": [f"{one.code} {one.name}: {one.message}" for one in report.findings] if report else [raised],
    }
    print(json.dumps(line))
    if folder := os.environ.get("LORA_CHECK_COMPATIBILITY"):
        with open(Path(folder) / f"peft-{version('peft')}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@pytest.mark.parametrize("name", [name for name, tuner in TUNERS.items() if available(tuner)])
def test_what_this_release_merges_is_verified_or_named(bases: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    wrong = [
        f"{dtype} {'safe' if safe else 'plain'}: {problem}"
        for dtype, safe in regimes(TUNERS[name])
        if (problem := case(name, dtype, safe, bases, tmp_path))
    ]
    assert wrong == []


def case(name: str, dtype: str, safe: bool, bases: Mapping[str, Path], root: Path) -> str:
    """What is wrong with one case: a merge by PEFT that is neither verified nor named, or a broken one that is."""
    adapter, merged = root / "adapter", root / f"merged-{dtype}-{safe}"
    try:
        train(TUNERS[name], bases["fp32"], adapter)
        merge(bases[dtype], adapter, merged, dtype, safe=safe)
    except Exception as problem:  # noqa: BLE001  whatever a release raises is what it says
        said = (str(problem).splitlines() or [type(problem).__name__])[0]
        seen(name, dtype, safe, None, said)
        expected = in_range(RAISES, f"{name} {dtype}")
        return "" if expected and re.search(expected, str(problem)) else said
    report = lora_check.check(bases[dtype], adapter, merged, jobs=1)
    seen(name, dtype, safe, report)
    told = [f"{one.code} {one.message}" for one in report.findings]
    if code := in_range(NAMED, name) or in_range(NAMED, f"{name} {dtype}"):
        return "" if any(one.startswith(code) for one in told) else f"not {code} but {told}"
    if report.verdict is not Verdict.VERIFIED or all(one.kind == "bystander" for one in report.comparisons):
        return f"{report.verdict.value}: {told}"
    broken = put_back(bases[dtype], merged, root / f"broken-{dtype}-{safe}", report)
    verdict = lora_check.check(bases[dtype], adapter, broken, jobs=1).verdict
    return "" if verdict is Verdict.REFUTED else f"with the base put back it is {verdict.value}"


def put_back(base: Path, merged: Path, out: Path, report: lora_check.Report) -> Path:
    """The merged folder with the base's own numbers in the first tensor that the adapter changed."""
    before, after = tensors(base), tensors(merged)
    target = next(one.tensor for one in report.comparisons if one.kind != "bystander")
    out.mkdir()
    save_file({**after, target: before[target]}, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "config.json").write_text((merged / "config.json").read_text())
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    safe = folder / "model.safetensors"
    if safe.exists():
        return load_file(str(safe))
    return torch.load(str(folder / "pytorch_model.bin"), map_location="cpu", weights_only=True)

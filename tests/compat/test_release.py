"""One release of PEFT at a time: what it trains, saves and merges is verified, in the arithmetic it is known for.

Only names that PEFT 0.4 and transformers 4.35 already have are used here, so that one file serves every row of tox.ini.
"""

from __future__ import annotations

import inspect
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_check
from lora_check.types import Verdict

pytestmark = pytest.mark.filterwarnings("default")  # old libraries warn about each other

RANK, ALPHA = 6, 10
TARGETS = {"list": ["q_proj", "v_proj"], "regex": r".*self_attn\.(q|v)_proj"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS = "model.safetensors"


def peft_release() -> tuple[int, int]:
    major, minor, *_ = version("peft").split(".")
    return int(major), int(minor)


def known_arithmetic(release: tuple[int, int], dtype: str, *, safe: bool) -> str:
    """In which order of operations a release merges on a CPU, as its source and its bits have it."""
    if dtype == "fp32":
        return "fp32-add"
    if (0, 7) <= release <= (0, 11):  # the adapter is cast to the base's dtype and multiplied in it
        return "storage-matmul"
    if safe and release >= (0, 16):  # the delta is cast before it is added
        return "rounded-delta"
    return "fp32-add"


def can_merge_safely() -> bool:
    from peft.tuners.lora import LoraModel

    return "safe_merge" in inspect.signature(LoraModel.merge_and_unload).parameters


@pytest.fixture(params=TARGETS, scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base in each dtype and an adapter, every factor of it away from zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp(request.param)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    base = LlamaForCausalLM(config)
    for name, dtype in DTYPES.items():
        base.to(dtype).save_pretrained(str(root / f"base-{name}"))
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS[request.param], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base.float(), lora)
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(str(root / "adapter"))
    return root


def merge(root: Path, dtype: str, *, safe: bool) -> Path:
    """Load base and adapter afresh, merge, save; the folder of the merged model."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    out = root / f"merged-{dtype}-{'safe' if safe else 'unsafe'}"
    base = LlamaForCausalLM.from_pretrained(str(root / f"base-{dtype}")).to(DTYPES[dtype])
    model: Any = PeftModel.from_pretrained(base, str(root / "adapter"))
    merged = model.merge_and_unload(**({"safe_merge": True} if safe else {}))
    merged.save_pretrained(str(out))
    return out


@pytest.mark.parametrize("safe", [False, True], ids=["unsafe", "safe"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_of_this_release_is_verified_and_one_without_its_last_layer_refuted(
    trained: Path, dtype: str, safe: bool
) -> None:
    if safe and not can_merge_safely():
        assert peft_release() < (0, 6), "safe_merge came with PEFT 0.6"
        return
    base, adapter = trained / f"base-{dtype}", trained / "adapter"
    merged = merge(trained, dtype, safe=safe)

    report = lora_check.check(base, adapter, merged, jobs=1)

    summary = report.as_dict()["summary"]
    print(f"peft {version('peft')} transformers {version('transformers')} {dtype} safe={safe}: {summary['arithmetic']}")
    assert report.verdict is Verdict.VERIFIED, report.findings
    assert summary["targets"] == summary["exact"] - summary["bystanders"] == 4
    assert summary["arithmetic"] == known_arithmetic(peft_release(), dtype, safe=safe)

    broken = shutil.copytree(merged, trained / f"{merged.name}-broken", dirs_exist_ok=True)
    put_back(base, broken, layer=1)
    refuted = lora_check.check(base, adapter, broken, jobs=1)

    assert refuted.verdict is Verdict.REFUTED
    assert [one.code for one in refuted.findings if one.severity == "error"] == ["LC502"]
    wrong = {one.tensor for one in refuted.comparisons if one.verdict is Verdict.REFUTED}
    assert wrong == {f"model.layers.1.self_attn.{name}.weight" for name in ("q_proj", "v_proj")}


def put_back(base: Path, merged: Path, *, layer: int) -> None:
    """Write the base's own tensors over those of one layer of a merged folder."""
    before = {name: one for name, one in load_file(base / WEIGHTS).items() if f".layers.{layer}." in name}
    assert before
    save_file(load_file(merged / WEIGHTS) | before, merged / WEIGHTS, metadata={"format": "pt"})

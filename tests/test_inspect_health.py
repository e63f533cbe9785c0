"""What is wrong with an adapter: each ailment is told by its name, and a sound adapter has none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_check.__main__ import main

OUT, IN, R, ALPHA = 12, 9, 4, 6
PREFIX = "base_model.model."
MODULES = tuple(f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj"))
FIRST = f"{PREFIX}{MODULES[0]}"
Tensors = dict[str, Tensor]
Told = dict[str, Any]


def tensors(dtype: torch.dtype = torch.float32) -> Tensors:
    make = torch.Generator().manual_seed(1)
    found = {}
    for name in MODULES:
        found[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(R, IN, generator=make).to(dtype)
        found[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(OUT, R, generator=make).to(dtype)
    return found


def adapter(folder: Path, held: Mapping[str, Tensor] | None, **told: Any) -> str:
    folder.mkdir()
    if held is not None:
        save_file(dict(held), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True, **told}))
    return str(folder)


def base(folder: Path) -> str:
    folder.mkdir()
    make = torch.Generator().manual_seed(2)
    held = {f"{name}.weight": torch.randn(OUT, IN, generator=make) for name in MODULES}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)


def inspected(tmp_path: Path, *argv: str) -> Told:
    file = tmp_path / "told.json"
    code = main(["inspect", *argv, "--json", str(file), "--output", str(tmp_path / "told.txt")])
    told: Told = json.loads(file.read_text())
    assert told.get("exit_code", 2) == code
    return told


def names(told: Told) -> dict[str, str]:
    """Code, or name of a remark -> severity."""
    return {one.get("code", one["name"]): one["severity"] for one in (*told["findings"], *told["remarks"])}


@pytest.mark.parametrize("with_base", [False, True], ids=["alone", "with base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sound_adapter_has_nothing_wrong(with_base: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    more = ["--base", base(tmp_path / "base")] if with_base else []
    told = inspected(tmp_path, adapter(tmp_path / "a", tensors(dtype)), *more)
    assert (names(told), told["exit_code"], told["summary"]["spectra"]) == ({}, 0, 4)
    assert any("--base BASE" in one for one in told["not_looked_at"]) != with_base
    assert "nothing wrong in what was looked at" in (tmp_path / "told.txt").read_text()


def change(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def changed(held: Tensors) -> None:
        held[name] = value(held[name]).contiguous()

    return changed


def every_b_zero(held: Tensors) -> None:
    for name in held:
        if "lora_B" in name:
            held[name].zero_()


def one_a_lost(held: Tensors) -> None:
    del held[f"{FIRST}.lora_A.weight"]


def twice_the_same_row(held: Tensors) -> None:
    held[f"{FIRST}.lora_A.weight"][3] = 2 * held[f"{FIRST}.lora_A.weight"][0]


def nearly_the_same_row(held: Tensors) -> None:
    """The rank is full, by a rounding error in the last place of one number."""
    a = held[f"{FIRST}.lora_A.weight"]
    a[3] = a[0]
    a[3, 2] = torch.nextafter(a[3, 2], torch.tensor(9.0))


def a_stranger(held: Tensors) -> None:
    held[f"{FIRST}.lora_E.weight"] = torch.ones(3)


AILMENTS: Mapping[str, tuple[Callable[[Tensors], None], dict[str, str], int]] = {
    "B of one module is zero": (
        change(f"{FIRST}.lora_B.weight", torch.zeros_like),
        {"zero-delta": "warning"},
        0,
    ),
    "every B is zero": (every_b_zero, {"LC004": "error"}, 1),
    "a NaN": (
        change(f"{FIRST}.lora_B.weight", lambda b: b.index_fill(0, torch.tensor([2]), torch.nan)),
        {"not-finite": "error"},
        1,
    ),
    "an infinity": (
        change(f"{FIRST}.lora_A.weight", lambda a: a.index_fill(0, torch.tensor([1]), torch.inf)),
        {"not-finite": "error"},
        1,
    ),
    "subnormal numbers": (
        change(f"{FIRST}.lora_B.weight", lambda b: b.index_fill(0, torch.tensor([2]), 1e-40)),
        {"subnormal": "info"},
        0,
    ),
    "a row that is another one twice": (twice_the_same_row, {"rank-collapse": "warning"}, 0),
    "a row that is another one but for its last bit": (nearly_the_same_row, {"rank-unresolved": "info"}, 0),
    "A is gone": (one_a_lost, {"unpaired": "error"}, 1),
    "another r": (
        change(f"{FIRST}.lora_A.weight", lambda a: a[:3]),
        {"no-product": "error"},
        1,
    ),
    "a tensor that nothing reads": (a_stranger, {"unread": "error"}, 1),
}


@pytest.mark.parametrize("case", AILMENTS)
def test_an_ailment_is_told_and_nothing_else(case: str, tmp_path: Path) -> None:
    spoil, wanted, code = AILMENTS[case]
    held = tensors()
    spoil(held)
    told = inspected(tmp_path, adapter(tmp_path / "a", held))
    assert (names(told), told["exit_code"]) == (wanted, code)
    page = (tmp_path / "told.txt").read_text()
    assert "nothing wrong" not in page
    assert all(name in page for name in wanted)


def test_factors_that_fp16_lost_have_their_code(tmp_path: Path) -> None:
    held = {name: (1e-7 * one if "lora_B" in name else one).half() for name, one in tensors().items()}
    assert names(inspected(tmp_path, adapter(tmp_path / "a", held)))["LC169"] == "warning"


def test_a_rank_that_the_configuration_denies(tmp_path: Path) -> None:
    told = inspected(tmp_path, adapter(tmp_path / "a", tensors(), r=5))
    assert names(told) == {"LC002": "error"}
    assert {one["rank"] for one in told["modules"]} == {R}
    assert {one["scale"] for one in told["modules"]} == {ALPHA / R}


def test_with_a_base_the_codes_of_a_report_are_told(tmp_path: Path) -> None:
    held, lost = tensors(), f"{PREFIX}model.layers.7.self_attn.q_proj"
    for role in ("A", "B"):
        held[f"{lost}.lora_{role}.weight"] = held.pop(f"{FIRST}.lora_{role}.weight")
    told = inspected(tmp_path, adapter(tmp_path / "a", held), "--base", base(tmp_path / "base"))
    assert {"LC205", "LC006"} <= names(told).keys()
    assert told["exit_code"] == 1


def test_an_empty_adapter(tmp_path: Path) -> None:
    told = inspected(tmp_path, adapter(tmp_path / "a", {}))
    assert (names(told), told["exit_code"]) == ({"LC003": "error"}, 1)


def test_what_cannot_be_decomposed_is_told_and_no_proof(tmp_path: Path) -> None:
    held = {
        f"{PREFIX}{name}.hada_{one}": torch.randn(*shape)
        for name in MODULES
        for one, shape in {"w1_a": (OUT, R), "w1_b": (R, IN), "w2_a": (OUT, R), "w2_b": (R, IN)}.items()
    }
    told = inspected(tmp_path, adapter(tmp_path / "a", held, peft_type="LOHA", alpha=6))
    assert told["exit_code"] == 3
    assert any("LOHA is no product of two factors" in one for one in told["not_looked_at"])


def test_a_configuration_alone_is_no_sound_adapter(tmp_path: Path) -> None:
    told = inspected(tmp_path, adapter(tmp_path / "a", None), "--base", base(tmp_path / "base"), "--parameters")
    assert told["exit_code"] == 3
    assert "nothing wrong" not in (tmp_path / "told.txt").read_text()
    assert told["summary"]["trained"] == 4 * R * (IN + OUT)
    assert sum("lora_A.default.weight" in one["name"] for one in told["parameters"]) == 4


def test_an_adapter_of_kohya_is_read_with_its_own_alphas(tmp_path: Path) -> None:
    held: Tensors = {}
    for number, name in enumerate(MODULES):
        key = f"lora_te_{name.replace('.', '_')}"
        held[f"{key}.lora_down.weight"], held[f"{key}.lora_up.weight"] = torch.randn(R, IN), torch.randn(OUT, R)
        held[f"{key}.alpha"] = torch.tensor(float(number + 1))
    file = tmp_path / "kohya.safetensors"
    save_file(held, file)
    told = inspected(tmp_path, str(file), "--base", base(tmp_path / "base"))
    assert told["inputs"]["adapter"]["dialect"] == "kohya"
    assert {one["name"]: one["scale"] for one in told["modules"]} == {
        name: (number + 1) / R for number, name in enumerate(MODULES)
    }
    assert told["exit_code"] == 3  # PEFT's names for it are not predicted
    assert told["summary"]["spectra"] == 4

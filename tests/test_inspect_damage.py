"""Hold `inspect` to damaged and strange adapters: it tells what it cannot see, and never that nothing is wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_inspect_health import ALPHA, FIRST, IN, MODULES, OUT, PREFIX, R, adapter, base, inspected, names, tensors
from torch import Tensor

from lora_check.__main__ import main

Capture = pytest.CaptureFixture[str]
A, B = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"


def told_as(tmp_path: Path) -> str:
    return (tmp_path / "told.txt").read_text()


# ------------------------------------------------------------------------------------------- the configuration

UNREADABLE = {
    "exclude_modules": ("[", 5, [1]),
    "layers_pattern": ("(", ["("], 7),
    "layers_to_transform": ("0", ["0"], {"0": 1}, 1.5),
    "modules_to_save": (["("],),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in UNREADABLE.items() for value in values])
def test_a_key_that_chooses_no_modules_is_told(key: str, value: Any, tmp_path: Path) -> None:
    place = base(tmp_path / "base")
    told = inspected(tmp_path, adapter(tmp_path / "a", tensors(), **{key: value}), "--base", place, "--parameters")
    assert told["exit_code"] in (1, 3)  # 1: modules_to_save names what the file does not carry
    assert [one for one in told["not_looked_at"] if f"adapter_config.json has {key} = " in one]
    assert "not as PEFT names them" in told_as(tmp_path)


READABLE = {"exclude_modules": "[k]_proj", "layers_pattern": "layers", "layers_to_transform": [0, 1]}


def test_keys_that_choose_modules_are_read(tmp_path: Path) -> None:
    place = base(tmp_path / "base")
    told = inspected(tmp_path, adapter(tmp_path / "a", tensors(), **READABLE), "--base", place, "--parameters")
    assert told["exit_code"] == 0
    assert sum("lora_A" in one["name"] for one in told["parameters"]) == len(MODULES)
    assert "not as PEFT names them" not in told_as(tmp_path)


def test_a_scale_of_zero_is_no_delta(tmp_path: Path) -> None:
    told = inspected(tmp_path, adapter(tmp_path / "a", tensors(), lora_alpha=0))
    assert (names(told), told["exit_code"]) == ({"LC004": "error"}, 1)
    part = inspected(tmp_path, adapter(tmp_path / "b", tensors(), alpha_pattern={"q_proj": 0}))
    assert (names(part), part["exit_code"]) == ({"zero-delta": "warning"}, 0)
    assert "no delta in 2 modules of 4, for a factor or the scale is zero: q_proj" in told_as(tmp_path)


def test_an_update_that_float64_cannot_hold_is_not_sound(tmp_path: Path) -> None:
    told = inspected(tmp_path, adapter(tmp_path / "a", tensors(), lora_alpha=1e300))
    assert (told["exit_code"], told["summary"]["spectra"]) == (3, 0)
    assert any("float64 cannot hold its square" in one for one in told["not_looked_at"])
    held = {name: 1e200 * one.double() for name, one in tensors().items()}
    assert inspected(tmp_path, adapter(tmp_path / "b", held))["exit_code"] == 3
    assert inspected(tmp_path, adapter(tmp_path / "c", tensors(), lora_alpha=1e100))["exit_code"] == 0


# --------------------------------------------------------------------------------------------------- the tensors

STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "float8_e4m3fn": lambda one: one.to(torch.float8_e4m3fn),
    "float8_e5m2": lambda one: one.to(torch.float8_e5m2),
    "complex64": lambda one: one.to(torch.complex64),
    "bool": lambda one: one > 0,
    "int8": lambda one: (9 * one).to(torch.int8),
    "uint16": lambda one: (9 * one.abs()).to(torch.uint16),
}


@pytest.mark.parametrize("dtype", STRANGE)
def test_a_dtype_that_no_adapter_has_is_told(dtype: str, tmp_path: Path) -> None:
    held = tensors()
    held[A] = STRANGE[dtype](held[A])
    told = inspected(tmp_path, adapter(tmp_path / "a", held))
    assert (told["exit_code"], told["summary"]["spectra"]) == (3, 3)
    assert [one for one in told["not_looked_at"] if f"is stored as {dtype}" in one]


def test_nan_of_eight_bits_is_told(tmp_path: Path) -> None:
    held = tensors()
    held[A] = held[A].index_fill(0, torch.tensor([1]), torch.nan).to(torch.float8_e4m3fn)
    told = inspected(tmp_path, adapter(tmp_path / "a", held))
    assert (names(told), told["exit_code"]) == ({"not-finite": "error"}, 1)


def test_numbers_that_torch_cannot_read_are_told(tmp_path: Path) -> None:
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no dtype of 4-bit floats")
    place, name = Path(adapter(tmp_path / "a", tensors(), modules_to_save=["lm_head"])), f"{PREFIX}lm_head.weight"
    file = place / "adapter_model.safetensors"
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    end = len(data) - 8 - size
    known = json.loads(data[8 : 8 + size]) | {name: {"dtype": "F4", "shape": [2, 8], "data_offsets": [end, end + 8]}}
    header = json.dumps(known).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :] + bytes(8))
    told = inspected(tmp_path, str(place))
    assert told["exit_code"] == 3
    assert f"{name}: numbers of its dtype cannot be read" in told["not_looked_at"]


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "scalar": lambda a: a[0, 0],
    "one axis": lambda a: a.flatten(),
    "no rows": lambda a: a[:0],
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_factor_that_is_no_matrix_is_told(case: str, tmp_path: Path) -> None:
    held = tensors()
    held[A] = SHAPES[case](held[A]).clone()
    told = inspected(tmp_path, adapter(tmp_path / "a", held))
    assert (names(told), told["exit_code"]) == ({"no-product": "error"}, 1)
    assert {one["rank"] for one in told["modules"]} == {R}
    assert f"A {tuple(held[A].shape)} have no product" in told_as(tmp_path)


# ----------------------------------------------------------------------------------------------- other methods


def test_a_prompt_is_not_at_fault_for_naming_no_module(tmp_path: Path) -> None:
    place, held = base(tmp_path / "base"), {"prompt_embeddings": torch.randn(5, IN)}
    prompt = adapter(tmp_path / "a", held, peft_type="PROMPT_TUNING", target_modules=None, num_virtual_tokens=5)
    for argv in ((), ("--base", place)):
        told = inspected(tmp_path, prompt, *argv)
        assert told["exit_code"] == 3
        assert not {"LC005", "LC006", "LC205"} & names(told).keys()
    lora = inspected(tmp_path, adapter(tmp_path / "b", held), "--base", place)
    assert (names(lora), lora["exit_code"]) == ({"LC005": "warning", "no-factors": "error"}, 1)


def test_a_method_is_told_with_the_letters_that_it_has(tmp_path: Path) -> None:
    held = {
        f"{PREFIX}{name}.vera_lambda_{one}": torch.ones(size)
        for name in MODULES
        for one, size in (("b", OUT), ("d", 7))
    }
    inspected(tmp_path, adapter(tmp_path / "a", held, peft_type="VERA", r=7, lora_alpha=None))
    assert "VERA, r = 7, peft" in told_as(tmp_path)
    scaled = {f"{PREFIX}{name}.ia3_l": torch.ones(OUT, 1) for name in MODULES}
    inspected(tmp_path, adapter(tmp_path / "b", scaled, peft_type="IA3", r=None, lora_alpha=None))
    assert "IA3, peft" in told_as(tmp_path)
    inspected(tmp_path, adapter(tmp_path / "c", tensors()))
    assert f"LORA, r = {R}, alpha = {ALPHA}, peft" in told_as(tmp_path)


def test_each_module_has_its_own_letters(tmp_path: Path) -> None:
    inspected(tmp_path, adapter(tmp_path / "a", tensors(), alpha_pattern={"v_proj": 10}), "--spectra")
    rows = [line.split() for line in told_as(tmp_path).splitlines() if line.startswith("model.layers.")]
    assert {(row[0].rsplit(".", 1)[1], *row[1:4]) for row in rows} == {
        ("q_proj", "4", "6", "1.5"),
        ("v_proj", "4", "10", "2.5"),
    }
    assert len(rows) == len(MODULES)


# ------------------------------------------------------------------------------------------------------ locations

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 12, "n_layer": 2, "n_head": 2}


def test_a_configuration_may_be_named_itself(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    save_file({"other": torch.ones(2)}, tmp_path / "model.safetensors")  # which config.json alone does not ask
    found = []
    for place in (tmp_path / "config.json", tmp_path):
        assert main(["inspect", str(place), "--format", "json", "--parameters"]) == 0
        found.append({one["name"] for one in json.loads(capsys.readouterr().out)["parameters"]})
    assert "transformer.wte.weight" in found[0]
    assert found[1] == {"other"}


def test_the_configuration_of_an_adapter_leads_to_its_tensors(tmp_path: Path) -> None:
    place = adapter(tmp_path / "a", tensors())
    told = inspected(tmp_path, f"{place}/adapter_config.json", "--base", base(tmp_path / "base"))
    assert (told["exit_code"], told["summary"]["spectra"]) == (0, len(MODULES))


@pytest.mark.parametrize("named", [True, False])
def test_a_model_without_a_head_is_said_to_be(named: bool, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({**GPT2, "architectures": GPT2["architectures"] if named else None})
    )
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert ("shapes from GPT2LMHeadModel, the class that config.json names" in text) == named
    assert ("shapes from transformers' gpt2 without a head: config.json names no class" in text) != named


def test_a_checkpoint_of_nothing_is_not_seen(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    told = inspected(tmp_path, str(tmp_path / "nothing"))
    assert (told["exit_code"], told["summary"]["parameters"]) == (3, 0)
    assert "there is no parameter" in told_as(tmp_path)


def test_a_base_without_weights_is_not_asked_for_twice(tmp_path: Path) -> None:
    place = Path(base(tmp_path / "base"))
    told = inspected(tmp_path, adapter(tmp_path / "a", tensors()), "--base", str(place))
    assert not [one for one in told["not_looked_at"] if "BASE" in one]
    (place / "model.safetensors").unlink()
    (place / "config.json").write_text(json.dumps(GPT2))
    bare = inspected(tmp_path, adapter(tmp_path / "b", tensors()), "--base", str(place))
    assert "whether its tensors name modules of a base (BASE has no weights)" in bare["not_looked_at"]
    alone = inspected(tmp_path, adapter(tmp_path / "c", tensors()))
    assert "whether its tensors name modules of a base (--base BASE)" in alone["not_looked_at"]


def test_the_page_goes_to_markdown_too(tmp_path: Path, capsys: Capture) -> None:
    place, file = adapter(tmp_path / "a", tensors()), tmp_path / "page.md"
    assert main(["inspect", place, "--spectra", "--markdown", str(file)]) == 0
    assert capsys.readouterr().out.startswith("adapter  ")
    assert main(["inspect", place, "--spectra", "--format", "markdown"]) == 0
    assert capsys.readouterr().out == file.read_text()
    assert "### by module" in file.read_text()
    assert main(["inspect", place, "--markdown", str(file), "--plot", str(file)]) == 2

"""The command `inspect`: two tables known from elsewhere, its formats, and what it refuses."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from lora_check.__main__ import main
from lora_check.inspection.model import SHIPPED, of_class, of_table
from lora_check.inspection.predict import file_size, predict
from lora_check.layouts._transformers_table import table_of
from lora_check.oracles.model_class import made

Capture = pytest.CaptureFixture[str]
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
TINY = {"n_embd": 24, "n_head": 3, "n_layer": 1, "vocab_size": 11, "n_positions": 7}
CONFIGS = {
    "custom": {"model_type": "my-own"},
    "broken": {**GPT2, "n_embd": 10, "n_head": 3},
    "llama": {"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3},
    "kindless": {"n_embd": 24},
    "numbered": {**GPT2, "architectures": [7]},
    "no model": {**GPT2, "architectures": ["GPT2Config"]},
}
PROJECTIONS = "c_attn,c_proj,c_fc"
KNOWN = {1: 147_456, 2: 294_912, 4: 589_824, 8: 1_179_648, 16: 2_359_296, 32: 4_718_592}
FULL = 124_440_576


@pytest.fixture
def gpt2(tmp_path: Path) -> str:
    """The folder of a GPT-2 of which there is nothing but the config.json."""
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(GPT2))
    return str(tmp_path / "gpt2")


def asked(capsys: Capture, *argv: str) -> dict[str, Any]:
    assert main(["inspect", *argv, "--format", "json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


# ----------------------------------------------------------------------------------------------------------- GPT-2


def test_the_table_of_gpt2_is_reproduced(gpt2: str, capsys: Capture) -> None:
    ranks = ",".join(map(str, KNOWN))
    told = asked(capsys, gpt2, "--ranks", ranks, "--targets", PROJECTIONS, "--extra-tokens", "1")["prediction"]
    assert told["full"] == FULL
    assert {one["rank"]: one["parameters"] for one in told["ranks"]} == KNOWN
    assert [one["bytes"] for one in told["ranks"]] == [
        {"float32": 4 * count, "bfloat16": 2 * count} for count in KNOWN.values()
    ]
    without = asked(capsys, gpt2, "--ranks", ranks, "--targets", PROJECTIONS)["prediction"]
    assert FULL - without["full"] == 768
    assert without["ranks"] == told["ranks"]


def test_only_all_four_projections_give_these_numbers(gpt2: str, capsys: Capture) -> None:
    """Every choice among the layers of GPT-2 that LoRA can be laid over: one alone comes to 147,456."""
    every = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "wte", "wpe", "lm_head"]
    model = of_class(GPT2, "gpt2")
    sizes = {name: predict(model, [name], [1]).ranks[0].parameters for name in every}
    fitting = [
        chosen
        for count in range(1, len(every) + 1)
        for chosen in itertools.combinations(every, count)
        if sum(sizes[name] for name in chosen) == KNOWN[1]
    ]
    assert fitting == [("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")]
    told = asked(capsys, gpt2, "--targets", PROJECTIONS)["prediction"]["targets"]
    assert [(one["wide"], one["out"], one["modules"], one["for_each_rank"]) for one in told] == [
        (768, 2304, 12, 36_864),
        (768, 768, 12, 18_432),
        (768, 3072, 12, 46_080),
        (3072, 768, 12, 46_080),
    ]


def test_a_token_more_is_what_resizing_makes(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=12, n_layer=1, n_head=2, n_positions=16, vocab_size=40, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config)
    known = of_class({**json.loads(config.to_json_string()), "architectures": ["GPT2LMHeadModel"]}, "small")
    assert known.size == sum(one.numel() for one in model.parameters())
    model.resize_token_embeddings(43)
    assert known.grown(3).size == sum(one.numel() for one in model.parameters())
    assert known.grown(3).size == known.size + 2 * 3 * 12  # the head is not tied


# ------------------------------------------------------------------------------------------------------- ChatGLM-6B


def test_how_large_the_lora_weights_of_chatglm_6b_are(capsys: Capture) -> None:
    told = asked(capsys, "--shapes", "chatglm-6b", "--ranks", "8", "--targets", "query_key_value")["prediction"]
    (one,) = told["ranks"]
    assert one["parameters"] == 28 * 8 * (4096 + 12288) == 3_670_016
    assert one["bytes"] == {"float32": 14_680_064, "bfloat16": 7_340_032}
    assert round(one["bytes"]["float32"] / 1e6, 1) == 14.7
    assert told["full"] == 6_173_286_400


def test_the_parameters_of_chatglm_6b_are_named_as_they_were_printed(tmp_path: Path, capsys: Capture) -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": ["query_key_value"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    shapes = ["--shapes", "chatglm-6b"]
    assert main(["inspect", str(tmp_path), *shapes, "--parameters", "--format", "json"]) == 3
    told = json.loads(capsys.readouterr().out)["parameters"]
    assert [(one["name"].removeprefix("base_model.model.transformer."), one["shape"]) for one in told[:16]] == [
        ("word_embeddings.weight", [130528, 4096]),
        ("layers.0.input_layernorm.weight", [4096]),
        ("layers.0.input_layernorm.bias", [4096]),
        ("layers.0.attention.query_key_value.base_layer.weight", [12288, 4096]),
        ("layers.0.attention.query_key_value.base_layer.bias", [12288]),
        ("layers.0.attention.query_key_value.lora_A.default.weight", [8, 4096]),
        ("layers.0.attention.query_key_value.lora_B.default.weight", [12288, 8]),
        ("layers.0.attention.dense.weight", [4096, 4096]),
        ("layers.0.attention.dense.bias", [4096]),
        ("layers.0.post_attention_layernorm.weight", [4096]),
        ("layers.0.post_attention_layernorm.bias", [4096]),
        ("layers.0.mlp.dense_h_to_4h.weight", [16384, 4096]),
        ("layers.0.mlp.dense_h_to_4h.bias", [16384]),
        ("layers.0.mlp.dense_4h_to_h.weight", [4096, 16384]),
        ("layers.0.mlp.dense_4h_to_h.bias", [4096]),
        ("layers.1.input_layernorm.weight", [4096]),
    ]
    assert len(told) == 1 + 28 * 14 + 2


# ---------------------------------------------------------------------------------------------------- sizes of files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_size_of_the_file_is_that_of_the_file_that_peft_writes(dtype: str, tmp_path: Path) -> None:
    small = {"n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 40}
    model = GPT2LMHeadModel(GPT2Config(**small))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        peft = get_peft_model(model, LoraConfig(r=3, target_modules=PROJECTIONS.split(","), fan_in_fan_out=True))
    peft.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    found = predict(of_class({**GPT2, **small}, "small"), PROJECTIONS.split(","), [3, 4])
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert found.ranks[0].file_bytes[dtype] == size
    assert found.ranks[1].file_bytes[dtype] > size
    assert file_size({"a": (3,)}, dtype) % 8 == (3 * (4 if dtype == "float32" else 2)) % 8


# ------------------------------------------------------------------------------------------------ formats and errors


def test_text_and_markdown_have_the_same_numbers(gpt2: str, tmp_path: Path, capsys: Capture) -> None:
    argv = ["inspect", gpt2, "--ranks", "8", "--targets", PROJECTIONS]
    pages = {}
    for form in ("text", "markdown"):
        file = tmp_path / f"page.{form}"
        assert main([*argv, "--format", form, "--output", str(file), "--json", str(tmp_path / "told.json")]) == 0
        pages[form] = file.read_text()
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "told.json").read_text())["schema"] == 1
    tables = {form: page.split("MB are")[0].split("class")[-1] for form, page in pages.items()}
    numbers = {form: re.findall(r"\d[\d,.]*", page) for form, page in tables.items()}
    assert numbers["text"] == numbers["markdown"]
    assert "1,179,648" in numbers["text"]
    assert "| c\\_attn" in pages["markdown"]


BAD = {
    "nothing": ([], "0 locations are given"),
    "two": (["a", "b"], "2 locations are given"),
    "nowhere": (["/nowhere"], "nothing lies at '/nowhere'"),
    "ranks without targets": (["{gpt2}", "--ranks", "8"], "--ranks without --targets"),
    "a target that is not there": (["{gpt2}", "--targets", "c_attn,q_proj"], "no module of {gpt2} is called q_proj"),
    "a target that is no layer": (["{gpt2}", "--targets", "ln_1"], "transformer.h.0.ln_1 is no linear layer"),
    "rank zero": (["{gpt2}", "--targets", "c_fc", "--ranks", "0"], "is not a whole number above zero"),
    "a target without a name": (["{gpt2}", "--targets", "c_fc,,c_proj"], "names no module in one place"),
    "no such table": (["--shapes", "glm-7b"], "no table of shapes lies at 'glm-7b'"),
    "base and table": (["{gpt2}", "--base", "x", "--shapes", "chatglm-6b"], "both tell the shapes"),
    "base of no adapter": (["{gpt2}", "--base", "{gpt2}"], "--base is that of an adapter"),
    "spectra of no adapter": (["{gpt2}", "--spectra"], "spectra are those of an adapter"),
    "not SVG": (["{gpt2}", "--plot", "x.png"], "only SVG is drawn"),
    "over an input": (["--shapes", "{table}", "--json", "{table}"], "that would replace"),
    "a table that is none": (["--shapes", "{table}"], "has 'x' for 'a', not a shape"),
    "custom code": (["{custom}"], "says 'my-own', which transformers does not know"),
    "no kind": (["{kindless}"], "config.json of {kindless} tells no model_type"),
    "no class": (["{numbered}"], "config.json of {numbered} names [7] as architectures"),
    "a class that is no model": (["{no model}"], "transformers has no model GPT2Config, which config.json of"),
    "a config that cannot be": (["{broken}"], "transformers could not make a gpt2 model of config.json of"),
    "a config that contradicts itself": (["{llama}"], "(10) is not a multiple of the number of attention heads (3)."),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, gpt2: str, tmp_path: Path, capsys: Capture) -> None:
    places = {"gpt2": gpt2, "table": str(tmp_path / "table.json")}
    (tmp_path / "table.json").write_text('{"a": "x"}')
    for name, told in CONFIGS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(told))
        places[name] = str(tmp_path / name)
    argv, said = BAD[case]
    before = sorted(tmp_path.rglob("*"))
    assert main(["inspect", *(word.format(**places) for word in argv)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said.format(**places) in shown.err
    assert re.fullmatch(r"error: [^\n]*[^\n:]\nhint: [^\n]+\n", shown.err)
    assert sorted(tmp_path.rglob("*")) == before


def test_one_architecture_needs_no_list() -> None:
    named = ("GPT2LMHeadModel", ["GPT2LMHeadModel"], "GPT2Model")
    one, listed, other = (made({**GPT2, **TINY, "architectures": names}, "x")["parameters"] for names in named)
    assert one == listed != other


def test_what_transformers_says_of_a_configuration_is_kept_to_itself(caplog: pytest.LogCaptureFixture) -> None:
    """Of labels, in the log, to stderr; `report` makes the same model to learn the names of its tensors."""
    import transformers

    config = {**GPT2, **TINY, "num_labels": 3, "id2label": {"0": "a", "1": "b"}}
    heard, level = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    heard.addHandler(caplog.handler)
    transformers.logging.set_verbosity_warning()
    try:
        assert made(config, "x")["parameters"]
        assert table_of(config) is not None
        assert not caplog.records
        transformers.CONFIG_MAPPING["gpt2"].from_dict(config)
        assert "num_labels" in caplog.text
    finally:
        heard.removeHandler(caplog.handler)
        transformers.logging.set_verbosity(level)


def test_a_table_of_ones_own(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"a.up.weight": [7, 5], "a.up.bias": [7], "wte.weight": [11, 5]}))
    argv = ["--shapes", str(file), "--targets", "up,wte", "--ranks", "3", "--extra-tokens", "2"]
    told = asked(capsys, *argv)["prediction"]
    assert told["full"] == 7 * 5 + 7 + 13 * 5
    assert told["ranks"][0]["parameters"] == 3 * (5 + 7) + 3 * (13 + 5)


def test_every_shipped_table_is_read() -> None:
    tables = [one.stem for one in SHIPPED.glob("*.json")]
    assert "chatglm-6b" in tables
    for name in tables:
        model = of_table(name)
        assert model.vocabulary
        assert model.size == sum(math.prod(shape) for shape in model.parameters.values())


def test_an_adapter_is_inspected_without_transformers_and_peft() -> None:
    demo = Path(__file__).parents[1] / "lora_check" / "data" / "demo"
    probe = (
        "import sys; from lora_check.__main__ import main; "
        "code = main(sys.argv[1:]); sys.exit(code or any(one in sys.modules for one in ('transformers', 'peft')))"
    )
    argv = [sys.executable, "-c", probe, "inspect", str(demo / "adapter"), "--base", str(demo / "base"), "--spectra"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

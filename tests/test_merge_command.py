"""Hold `merge` to PEFT's own bits, to the check that it must pass, and to leaving nothing behind when it stops."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import quantised_files
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cold_import import loaded_by
from torch import Tensor

import lora_check
from lora_check.__main__ import main
from lora_check.commands import merge as command
from lora_check.errors import InputError, LoraCheckError, UnknownFormatError, UsageError, WrongInputError
from lora_check.formats._safetensors_files import read_header
from lora_check.writing import tensors, workplace

ROOT = Path(__file__).parents[1]
SAFE = {False: "fp32-add", True: "rounded-delta"}
WORLDS = (
    ("llama-qv", "fp32"),
    ("llama-qv", "fp16"),
    ("llama-all-seven", "bf16"),
    ("llama-rslora", "bf16"),
    ("llama-patterns", "bf16"),
    ("llama-dora", "bf16"),
    ("llama-two-adapters", "bf16"),
    ("llama-bias-all", "bf16"),
    ("llama-saved-head", "fp16"),
    ("llama-saved-norm-and-embed", "bf16"),
    ("llama-tied-both", "bf16"),
    ("llama-tied-trainable-tokens", "bf16"),
    ("llama-untied-embed-head", "bf16"),
    ("gpt2", "bf16"),
    ("conv2d", "fp32"),
    ("conv-dora", "bf16"),
    ("embedding", "bf16"),
    ("linear-bias-lora", "bf16"),
    ("sharded", "bf16"),
)
LAYER = "model.layers.0.self_attn.q_proj.weight"


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names, shapes, dtypes and bits."""
    if one.keys() != other.keys():
        return False
    pairs = [(one[name], other[name]) for name in one]
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))
        for a, b in pairs
    )


def exact(report: lora_check.Report) -> bool:
    return report.verdict.value == "verified" and all(one.exact for one in report.comparisons)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def rewritten(folder: Path, file: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file, or the tensors of a safetensors file."""
    path = folder / file
    if path.suffix == ".json":
        told = json.loads(path.read_text())
        change(told)
        path.write_text(json.dumps(told, indent=2))
    else:
        held = load_file(path)
        change(held)
        save_file(held, path, metadata={"format": "pt"})


@pytest.fixture
def files(world, tmp_path):
    """(world, dtype) -> copies of its base and adapter that a test may change, and where to write."""

    def get(name: str, dtype: str = "bf16") -> SimpleNamespace:
        found = world(name, dtype)
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        shutil.copytree(found.base, base)
        shutil.copytree(found.adapters[0], adapter)
        return SimpleNamespace(base=base, adapter=adapter, out=tmp_path / "out", merged=found.merged)

    return get


@pytest.fixture
def home(tmp_path):
    """The folder that must hold nothing but what a test put there."""
    return lambda: {path.name for path in tmp_path.iterdir()}


# ------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("safe", [False, True], ids=["unsafe", "safe"])
@pytest.mark.parametrize("case", WORLDS, ids="-".join)
def test_every_bit_is_that_of_peft_and_the_check_agrees(world, load, tmp_path, case, safe) -> None:
    inputs = world(*case, safe)
    done = lora_check.merge(inputs.base, inputs.adapters, tmp_path / "out", arithmetic=SAFE[safe], jobs=2)
    assert same(load(tmp_path / "out"), load(inputs.merged))
    assert exact(lora_check.check(inputs.base, inputs.adapters, tmp_path / "out", jobs=1))
    assert done.tensors == len(load(inputs.merged))
    assert done.targets > 0


def test_the_other_order_has_other_bits(world, load, tmp_path) -> None:
    inputs = world("llama-all-seven", "bf16", True)
    lora_check.merge(inputs.base, inputs.adapters, tmp_path / "out")
    assert not same(load(tmp_path / "out"), load(inputs.merged))


def test_factors_in_the_dtype_of_the_model_have_an_arithmetic_of_their_own(world, load, tmp_path) -> None:
    inputs = world("no-autocast", "bf16")
    lora_check.merge(inputs.base, inputs.adapters, tmp_path / "out", arithmetic="rounded-factors-and-delta")
    assert same(load(tmp_path / "out"), load(inputs.merged))


@pytest.mark.parametrize("name", command.ARITHMETICS)
def test_every_arithmetic_passes_the_check(world, tmp_path, name) -> None:
    inputs = world("llama-qv", "bf16")
    lora_check.merge(inputs.base, inputs.adapters, tmp_path / "out", arithmetic=name, jobs=1)
    report = lora_check.check(inputs.base, inputs.adapters, tmp_path / "out", jobs=1)
    assert report.verdict.value == "verified"
    assert exact(report) or name == "storage-throughout"  # products in bf16, which LoRA's hypotheses spell otherwise


def test_help_lists_the_arithmetics_that_can_be_written() -> None:
    assert tuple(tensors.written_arithmetics()) == command.ARITHMETICS
    with pytest.raises(UsageError, match="fp32-fused"):
        tensors.arithmetic("fp32-fused")


@pytest.mark.parametrize(("rows", "height"), [(1, 16), (15, 1), (33, 16), (40, 1), (95, 64), (96, 32), (1000, 113)])
def test_tiles_are_high_enough_and_cover_each_row_once(rows, height) -> None:
    found = list(tensors.spans(0, rows, height))
    assert [row for span in found for row in range(span.start, span.stop)] == list(range(rows))
    assert all(span.stop - span.start >= min(rows, tensors.FEWEST) for span in found)
    assert len(found) <= max(1, -(-rows // height))


@pytest.mark.parametrize("turned", [False, True])
def test_tiles_have_the_bits_of_the_whole_product(turned) -> None:
    """PEFT multiplies whole matrices; fewer rows at a time may be summed in another order."""
    torch.manual_seed(2)
    a, b = torch.randn(9, 640), torch.randn(1030, 9)
    whole, left, right = ((b @ a).T, a.T, b.T) if turned else (b @ a, b, a)
    parts = [left[rows] @ right for rows in tensors.spans(0, len(left), 1)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(torch.cat([left[row : row + 1] @ right for row in range(len(left))]), whole)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_another_dtype_is_that_of_a_base_loaded_in_it(world, load, tmp_path, dtype) -> None:
    inputs = world("cast-base", dtype)
    lora_check.merge(inputs.base, inputs.adapters, tmp_path / "out", dtype=dtype)
    assert same(load(tmp_path / "out"), load(inputs.merged))
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["dtype"] == json.loads((inputs.merged / "config.json").read_text())["dtype"]


def test_weights_and_combinations_are_those_of_the_check(world, tmp_path) -> None:
    inputs = world("llama-two-adapters", "bf16")
    for number, options in enumerate(({"weights": [0.5, -2.0]}, {"weights": [0.5, 2.0], "combination": "cat"})):
        out = tmp_path / f"out{number}"
        lora_check.merge(inputs.base, inputs.adapters, out, **options)
        assert exact(lora_check.check(inputs.base, inputs.adapters, out, jobs=1, **options))
        assert lora_check.check(inputs.base, inputs.adapters, out, jobs=1).verdict.value == "refuted"


def test_tensors_in_memory_are_merged_as_their_files_are(world, load, tmp_path) -> None:
    inputs = world("llama-qv", "bf16")
    lora_check.merge(load(inputs.base), inputs.adapters, tmp_path / "memory")
    lora_check.merge(inputs.base, inputs.adapters, tmp_path / "files")
    assert same(load(tmp_path / "memory"), load(tmp_path / "files"))
    assert "config.json" not in names(tmp_path / "memory")


def test_integers_of_a_base_keep_their_bits(files, load) -> None:
    made = files("conv2d", "fp32")
    wide = torch.tensor([2**53 + 1, -(2**62) - 3])
    rewritten(made.base, "model.safetensors", lambda held: held.update(counter=wide))
    lora_check.merge(made.base, made.adapter, made.out, dtype="bf16")
    assert torch.equal(load(made.out)["counter"], wide)


def test_the_number_of_workers_changes_no_byte(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tensors, "PIECE", 1 << 9)
    monkeypatch.setattr(tensors, "TILE_ELEMENTS", 1 << 7)
    inputs = world("llama-dora", "bf16")
    for jobs in (1, 3):
        lora_check.merge(inputs.base, inputs.adapters, tmp_path / f"out{jobs}", jobs=jobs)
    first, second = ((tmp_path / f"out{jobs}" / "model.safetensors").read_bytes() for jobs in (1, 3))
    assert first == second
    assert same(load_file(tmp_path / "out1" / "model.safetensors"), load_file(inputs.merged / "model.safetensors"))


def test_the_merged_model_answers_as_that_of_peft(world, tmp_path) -> None:
    from transformers import LlamaForCausalLM

    inputs = world("llama-two-adapters", "bf16")
    lora_check.merge(inputs.base, inputs.adapters, tmp_path / "out")
    words = torch.tensor([[1, 7, 30, 4, 22]])
    places = (tmp_path / "out", inputs.merged, inputs.base)
    ours, theirs, base = (LlamaForCausalLM.from_pretrained(place)(words).logits for place in places)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, base)


# ------------------------------------------------------------------------------ the files


def cut(folder: Path, metadata: Mapping[str, str]) -> None:
    """Put the model of a folder into two shards of uncommon names, the second of them first in the index."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = list(reversed(held))
    parts = {"weights-b.safetensors": keys[:9], "weights-a.safetensors": keys[9:]}
    for file, part in parts.items():
        save_file({key: held[key] for key in part}, folder / file, metadata=dict(metadata))
    index = {
        "metadata": {"total_size": 5, "total_parameters": 7, "by": "me"},
        "weight_map": {key: file for file, part in parts.items() for key in part},
    }
    (folder / "weights.safetensors.index.json").write_text(json.dumps(index))


def test_the_files_are_those_of_the_base(files) -> None:
    made = files("llama-qv")
    cut(made.base, {"format": "pt", "of": "somewhere"})
    lora_check.merge(made.base, made.adapter, made.out)
    index, before = (json.loads((at / "weights.safetensors.index.json").read_text()) for at in (made.out, made.base))
    assert index["weight_map"] == before["weight_map"]
    assert list(index["weight_map"]) == list(before["weight_map"])
    held = load_file(made.out / "weights-a.safetensors") | load_file(made.out / "weights-b.safetensors")
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in held.values()),
        "total_parameters": sum(tensor.numel() for tensor in held.values()),
        "by": "me",
    }
    for file in ("weights-a.safetensors", "weights-b.safetensors"):
        ours, theirs = read_header(made.out / file), read_header(made.base / file)
        assert ours == theirs
        assert ours.metadata == {"format": "pt", "of": "somewhere"}
    assert exact(lora_check.check(made.base, made.adapter, made.out, jobs=1))


def test_shards_of_a_size_are_named_and_cut_as_transformers_does(world, load, tmp_path) -> None:
    from transformers import LlamaForCausalLM

    inputs = world("llama-qv", "bf16")
    lora_check.merge(inputs.base, inputs.adapters, tmp_path / "out", max_shard_size="12KB")
    LlamaForCausalLM.from_pretrained(inputs.merged).save_pretrained(tmp_path / "theirs", max_shard_size="12KB")
    index = "model.safetensors.index.json"
    ours, theirs = (json.loads((tmp_path / at / index).read_text()) for at in ("out", "theirs"))
    assert set(ours["weight_map"].values()) == set(theirs["weight_map"].values())
    assert len(set(ours["weight_map"].values())) > 2
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert same(load(tmp_path / "out"), load(inputs.merged))
    LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_every_tensor_begins_at_a_multiple_of_its_width(files, load) -> None:
    made = files("llama-qv", "bf16")
    odd = {"three": torch.arange(3, dtype=torch.int32), "byte": torch.ones(1, dtype=torch.uint8)}
    rewritten(made.base, "model.safetensors", lambda held: held.update(odd))
    lora_check.merge(made.base, made.adapter, made.out, dtype="fp64")
    path = made.out / "model.safetensors"
    start = path.stat().st_size - read_header(path).entries[-1].end
    for entry in read_header(path).entries:
        size = (entry.end - entry.begin) // max(1, entry.meta.numel)
        assert (start + entry.begin) % size == 0, entry
    held = load(made.out)
    assert {name: held[name].dtype for name in odd} == {name: tensor.dtype for name, tensor in odd.items()}
    assert held[LAYER].dtype == torch.float64
    assert exact(lora_check.check(made.base, made.adapter, made.out, jobs=1))


def test_pickles_become_safetensors(world, tmp_path) -> None:
    inputs = world("sharded", "bf16")
    lora_check.merge(inputs.base, inputs.adapters, tmp_path / "out")
    assert names(tmp_path / "out") == {"model.safetensors", "config.json"}
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_a_model_is_used_with_comes_along_and_other_weights_do_not(files) -> None:
    made = files("llama-qv")
    kept = {"tokenizer.json": "{}", "tokenizer.model": "of the base", "chat_template.jinja": "hi", "LICENSE": "mine"}
    left = {"README.md": "card", "training_args.bin": "x", "adapter_config.json": "{}", "optimizer.pt": "y"}
    for name, text in {**kept, **left}.items():
        (made.base / name).write_text(text)
    (made.base / "pytorch_model.bin").write_bytes(b"other weights")
    (made.adapter / "tokenizer.json").write_text('{"of": "the adapter"}')
    lora_check.merge(made.base, made.adapter, made.out)
    assert names(made.out) == {"model.safetensors", "config.json", "generation_config.json", *kept}
    for name in (*kept, "config.json", "generation_config.json"):
        assert (made.out / name).read_bytes() == (made.base / name).read_bytes()


def test_the_tokenizer_of_the_adapter_comes_where_it_trained_tokens(files) -> None:
    made = files("llama-trainable-tokens")
    for name in ("tokenizer.json", "merges.txt", "preprocessor_config.json"):
        (made.base / name).write_text('"of the base"')
    (made.adapter / "chat_template.jinja").write_text("alone it is no tokenizer")
    lora_check.merge(made.base, made.adapter, made.out)
    assert (made.out / "tokenizer.json").read_text() == '"of the base"'
    assert "chat_template.jinja" not in names(made.out)
    shutil.rmtree(made.out)
    (made.adapter / "tokenizer.json").write_text('"of the adapter"')
    lora_check.merge(made.base, made.adapter, made.out)
    assert (made.out / "tokenizer.json").read_text() == '"of the adapter"'
    assert {"chat_template.jinja", "preprocessor_config.json"} <= names(made.out)
    assert "merges.txt" not in names(made.out)


def test_a_larger_vocabulary_is_told_and_loads(files) -> None:
    from transformers import LlamaForCausalLM

    made = files("llama-qv")
    torch.manual_seed(4)
    larger = {f"base_model.model.{name}.weight": torch.randn(46, 24) for name in ("model.embed_tokens", "lm_head")}
    rewritten(made.adapter, "adapter_model.safetensors", lambda held: held.update(larger))
    rewritten(
        made.adapter, "adapter_config.json", lambda told: told.update(modules_to_save=["embed_tokens", "lm_head"])
    )
    lora_check.merge(made.base, made.adapter, made.out)
    assert json.loads((made.out / "config.json").read_text())["vocab_size"] == 46
    assert exact(lora_check.check(made.base, made.adapter, made.out, jobs=1))
    assert LlamaForCausalLM.from_pretrained(made.out).lm_head.weight.shape == (46, 24)


def test_a_trained_head_of_a_tied_model_is_untied_as_peft_does(files, load, tmp_path) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    made = files("llama-tied-trainable-tokens")
    torch.manual_seed(5)
    head = {"base_model.model.lm_head.weight": torch.randn(40, 24)}
    rewritten(
        made.adapter, "adapter_model.safetensors", lambda held: [held.pop(one) for one in [*held] if "tok" in one]
    )
    rewritten(made.adapter, "adapter_model.safetensors", lambda held: held.update(head))
    rewritten(
        made.adapter,
        "adapter_config.json",
        lambda told: told.update(modules_to_save=["lm_head"], trainable_token_indices=None),
    )
    lora_check.merge(made.base, made.adapter, made.out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a head that is untied, which is the point
        tuned = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(made.base), made.adapter)
        tuned.merge_and_unload().save_pretrained(tmp_path / "theirs")
    assert same(load(made.out), load(tmp_path / "theirs"))
    for at in (made.out, tmp_path / "theirs"):
        assert json.loads((at / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_stored_beside_the_embedding_it_is_tied_to_is_kept_apart(files, load) -> None:
    made = files("llama-tied-embed")
    doubled = load(made.base)["model.embed_tokens.weight"].clone()
    rewritten(made.base, "model.safetensors", lambda held: held.update({"lm_head.weight": doubled}))
    lora_check.merge(made.base, made.adapter, made.out)
    assert exact(lora_check.check(made.base, made.adapter, made.out, jobs=1))
    assert torch.equal(load(made.out)["lm_head.weight"], doubled)
    assert json.loads((made.out / "config.json").read_text())["tie_word_embeddings"] is False


# ------------------------------------------------------------------------------ quantised bases


def test_a_quantised_base_is_decoded_where_a_dtype_is_given(tmp_path, load, home) -> None:
    made = quantised_files.model(tmp_path)
    codes = quantised_files.in_4bit(made.tensors, quantised_files.LINEAR)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}
    base = quantised_files.write(tmp_path / "codes", codes, config)
    before = home()
    with pytest.raises(UsageError, match=r"are stored as .*nf4") as raised:
        lora_check.merge(base, made.adapter, tmp_path / "out")
    assert "--dtype bfloat16" in raised.value.hint
    assert home() == before
    lora_check.merge(base, made.adapter, tmp_path / "out", dtype="bfloat16")
    numbers = quantised_files.from_4bit(codes)
    lora_check.merge(numbers, made.adapter, tmp_path / "numbers", dtype="bfloat16")
    assert same(load(tmp_path / "out"), load(tmp_path / "numbers"))
    assert lora_check.check(base, made.adapter, tmp_path / "out", jobs=1).verdict.value == "verified"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


# ------------------------------------------------------------------------------ refusals


def unknown_module(made: SimpleNamespace) -> None:
    extra = {"base_model.model.model.nowhere.lora_A.weight": torch.ones(3, 24)}
    rewritten(made.adapter, "adapter_model.safetensors", lambda held: held.update(extra))


def wrong_shape(made: SimpleNamespace) -> None:
    key = f"base_model.model.{LAYER.removesuffix('.weight')}.lora_A.weight"
    rewritten(made.adapter, "adapter_model.safetensors", lambda held: held.update({key: held[key][:, 1:].contiguous()}))


def broken_promise(made: SimpleNamespace) -> None:
    rewritten(made.adapter, "adapter_config.json", lambda told: told.update(modules_to_save=["lm_head"]))


def unmergeable(made: SimpleNamespace) -> None:
    rewritten(made.adapter, "adapter_config.json", lambda told: told.update(alora_invocation_tokens=[1, 2]))


def too_large(made: SimpleNamespace) -> None:
    rewritten(made.base, "model.safetensors", lambda held: held[LAYER].view(-1)[3:4].fill_(float("inf")))


def no_numbers(made: SimpleNamespace) -> None:
    save_file({"counter": torch.arange(3)}, made.base / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (unknown_module, InputError, r"nowhere\.lora_A\.weight of .* names nothing in BASE"),
        (wrong_shape, InputError, "cannot be recomputed"),
        (broken_promise, InputError, "configuration and tensors disagree: modules_to_save"),
        (unmergeable, InputError, "cannot be recomputed"),
        (too_large, InputError, f"{LAYER} would hold numbers that are not finite in bfloat16"),
        (no_numbers, WrongInputError, "holds no floating numbers"),
    ],
)
def test_what_cannot_be_merged_is_told_and_nothing_is_written(files, home, capsys, spoil, error, said) -> None:
    made = files("llama-qv")
    lora_check.merge(made.base, made.adapter, made.out)
    shutil.rmtree(made.out)
    spoil(made)
    before = home()
    with pytest.raises(error, match=said):
        lora_check.merge(made.base, made.adapter, made.out)
    assert home() == before
    assert main(["merge", str(made.base), str(made.adapter), str(made.out)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]


def test_what_a_report_would_warn_of_is_told(files, capsys) -> None:
    made = files("llama-qv")
    assert lora_check.merge(made.base, made.adapter, made.out, dtype="fp16").warnings == ()
    shutil.rmtree(made.out)
    rewritten(
        made.adapter, "adapter_model.safetensors", lambda held: [held.pop(one) for one in [*held] if "layers.1" in one]
    )
    assert main(["merge", str(made.base), str(made.adapter), str(made.out)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("merged into")
    assert err.startswith("warning: ")
    assert err.endswith("(LC006)\n")


def test_a_number_beyond_fp16_is_no_infinity_in_the_file(files, home) -> None:
    made = files("llama-qv", "fp32")
    rewritten(made.base, "model.safetensors", lambda held: held["lm_head.weight"].view(-1)[5:6].fill_(70000.0))
    before = home()
    with pytest.raises(InputError, match=r"lm_head.weight would hold numbers that are not finite in float16"):
        lora_check.merge(made.base, made.adapter, made.out, dtype="fp16")
    assert home() == before
    lora_check.merge(made.base, made.adapter, made.out, dtype="bf16")


def test_a_gguf_base_is_refused(files, monkeypatch) -> None:
    made = files("llama-qv")
    rewritten(made.base, "config.json", lambda told: told.update(gguf={"general.architecture": "llama"}))
    with pytest.raises(UnknownFormatError, match="GGUF"):
        lora_check.merge(made.base, made.adapter, made.out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "'int8' is no dtype"),
        ({"max_shard_size": "large"}, "'large' is no size"),
        ({"max_shard_size": 0}, "0 is no size"),
        ({"arithmetic": "tf32"}, "'tf32'"),
        ({"jobs": 0}, "0 jobs"),
        ({"weights": [1.0, 2.0]}, "2 weights for 1 adapters"),
    ],
)
def test_options_that_cannot_be_meant(files, home, options, said) -> None:
    made = files("llama-qv")
    before = home()
    with pytest.raises(UsageError, match=said):
        lora_check.merge(made.base, made.adapter, made.out, **options)
    assert home() == before


# ------------------------------------------------------------------------------ the place


def test_nothing_is_replaced(files, home) -> None:
    made = files("llama-qv")
    made.out.mkdir()
    lora_check.merge(made.base, made.adapter, made.out)  # an empty folder is as good as none
    before = (made.out / "model.safetensors").stat().st_mtime_ns
    for out in (made.out, made.base, made.out / "model.safetensors"):
        with pytest.raises(UsageError, match="nothing is replaced"):
            lora_check.merge(made.base, made.adapter, out)
    with pytest.raises(UsageError, match="there is no folder"):
        lora_check.merge(made.base, made.adapter, made.out / "model.safetensors" / "deep")
    assert (made.out / "model.safetensors").stat().st_mtime_ns == before
    assert home() == {"base", "adapter", "out"}


def test_a_disk_without_room_is_told_before_a_byte_is_written(files, home, monkeypatch) -> None:
    made = files("llama-qv")
    before = home()
    size = (made.base / "model.safetensors").stat().st_size
    monkeypatch.setattr(workplace.shutil, "disk_usage", lambda _: SimpleNamespace(free=size // 2))
    with pytest.raises(UsageError, match=r"takes [\d.]+kB more, and .* has [\d.]+kB free"):
        lora_check.merge(made.base, made.adapter, made.out)
    assert home() == before
    monkeypatch.setattr(workplace.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * size))
    lora_check.merge(made.base, made.adapter, made.out)


def test_a_file_that_cannot_grow_is_one_sentence_and_leaves_nothing(files, home) -> None:
    made = files("llama-qv")
    before = home()
    limits = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
    run = f"{limits} from lora_check.__main__ import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", run, "merge", made.base, made.adapter, made.out]
    done = subprocess.run([str(one) for one in argv], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "could not be written: file too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert home() == before


def test_two_merges_into_one_place_do_not_meet(files) -> None:
    made = files("llama-qv")
    folder = made.out.with_name(".out.part")
    folder.mkdir()
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another merge into"):
            lora_check.merge(made.base, made.adapter, made.out)
    finally:
        os.close(held)
    lora_check.merge(made.base, made.adapter, made.out)


def test_a_folder_of_someone_else_is_not_cleared(files) -> None:
    made = files("llama-qv")
    folder = made.out.with_name(".out.part")
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is in the way"):
        lora_check.merge(made.base, made.adapter, made.out)
    assert (folder / "thesis.txt").read_text() == "years of work"


# ------------------------------------------------------------------------------ runs that stop

SHARDS, ROWS, COLUMNS = 3, 4096, 4096


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A base of three shards of 34 MB, and an adapter over all of it."""
    root = tmp_path_factory.mktemp("large")
    base, adapter = root / "base", root / "adapter"
    base.mkdir()
    adapter.mkdir()
    torch.manual_seed(1)
    homes, factors = {}, {}
    for number in range(SHARDS):
        name, file = f"layers.{number}.fc", f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file({f"{name}.weight": torch.rand(ROWS, COLUMNS, dtype=torch.bfloat16)}, base / file)
        homes[f"{name}.weight"] = file
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(6, COLUMNS) * 0.01
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(ROWS, 6) * 0.01
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": 10, "target_modules": ["fc"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return SimpleNamespace(base=base, adapter=adapter)


def stopped(large: SimpleNamespace, out: Path, how: signal.Signals) -> tuple[int, str]:
    """Begin a merge in a process of its own and stop it when it has finished its first shard and begun the second."""
    argv = [sys.executable, "-m", "lora_check", "merge", large.base, large.adapter, out, "--jobs", "1"]
    second = out.with_name(f".{out.name}.part") / "model-00002-of-00003.safetensors.part"
    options: dict[str, Any] = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    # Whoever runs the tests in the background has them ignore an interrupt, and what they start too.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([str(one) for one in argv], **options) as run:
        while run.poll() is None and not second.exists():
            time.sleep(0.002)
        with suppress(ProcessLookupError):
            run.send_signal(how)
        _, err = run.communicate(timeout=60)
        return run.returncode, err


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_run_that_stops_shows_nothing_and_the_next_goes_on(large, load, tmp_path, how) -> None:
    out = tmp_path / "out"
    code, err = stopped(large, out, how)
    assert code == (-9 if how is signal.SIGKILL else 130)
    assert "Traceback" not in err
    assert names(tmp_path) == {".out.part"}
    if how is signal.SIGINT:
        assert not any(name.endswith(".part") for name in names(tmp_path / ".out.part"))
    done = lora_check.merge(large.base, large.adapter, out)
    assert 0 < len(done.kept) < SHARDS
    assert done.written < done.bytes
    assert names(tmp_path) == {"out"}
    assert not any(name.startswith(".") for name in names(out))
    assert exact(lora_check.check(large.base, large.adapter, out, jobs=1))


def test_what_was_finished_for_other_inputs_is_made_anew(large, tmp_path) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(large.adapter, adapter)
    stopped(SimpleNamespace(base=large.base, adapter=adapter), out, signal.SIGKILL)
    rewritten(adapter, "adapter_config.json", lambda told: told.update(lora_alpha=11))
    done = lora_check.merge(large.base, adapter, out)
    assert done.kept == ()
    assert exact(lora_check.check(large.base, adapter, out, jobs=1))


def test_a_finished_shard_that_lost_bytes_is_made_anew(large, tmp_path) -> None:
    out = tmp_path / "out"
    stopped(large, out, signal.SIGKILL)
    first = tmp_path / ".out.part" / "model-00001-of-00003.safetensors"
    os.truncate(first, first.stat().st_size - 1)
    assert first.name not in lora_check.merge(large.base, large.adapter, out).kept


PROBE = """
import sys, threading
import torch, lora_check.work, lora_check.merging as merging
from lora_check import registry
from lora_check.writing import tensors
for folder in ("formats", "layouts", "recipes", "dialects", "faults", "quantisations", "combinations"):
    registry.load(folder)
tensors.TILE_ELEMENTS = int(sys.argv[4])

def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Anonymous:"))

def watch():
    while not stop.wait(0.002):
        seen.append(private())

begun, seen, stop = private(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
merging.merge(*sys.argv[1:4], jobs=1)
stop.set()
watcher.join()
print(max(seen) - begun)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells private memory")
@pytest.mark.parametrize(("tile", "little"), [(tensors.TILE_ELEMENTS, True), (1 << 30, False)])
def test_a_merge_of_100_mb_takes_little_memory(large, tmp_path, tile, little) -> None:
    argv = [sys.executable, "-c", PROBE, large.base, large.adapter, tmp_path / "out", tile]
    done = subprocess.run([str(one) for one in argv], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (float(done.stdout) < 64) is little


# ------------------------------------------------------------------------------ the command


def test_the_command_says_what_it_wrote(files, tmp_path, capsys) -> None:
    made = files("llama-qv")
    argv = ["merge", str(made.base), str(made.adapter), str(made.out), "--json", str(tmp_path / "told.json")]
    assert main([*argv, "--dtype", "fp16", "--arithmetic", "rounded-delta", "--jobs", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"merged into {made.out}: 3 files, ")
    assert out.endswith("4 of 21 tensors changed, rounded-delta\n")
    assert err == ""
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["command"] == "merge"
    assert told["exit_code"] == 0
    assert set(told["files"]) == names(made.out)
    assert told["bytes"] == (made.out / "model.safetensors").stat().st_size
    assert main(argv) == 2
    assert "nothing is replaced" in json.loads((tmp_path / "told.json").read_text())["error"]["message"]
    assert main(["report", *argv[1:4]]) == 0


def test_help_needs_no_tensor_library() -> None:
    assert loaded_by("merge", "--help") == {"code": 0, "loaded": []}


def test_a_merge_imports_neither_peft_nor_transformers(files) -> None:
    made = files("llama-qv")
    answer = loaded_by("merge", str(made.base), str(made.adapter), str(made.out))
    assert answer["code"] == 0
    assert not {"peft", "transformers"}.intersection(answer["loaded"])


def test_errors_are_of_this_package(tmp_path) -> None:
    with pytest.raises(LoraCheckError, match="base"):
        lora_check.merge(tmp_path / "absent", tmp_path, tmp_path / "out")

"""Checkpoints in several files: parts and shards of pickles and of GGUF, and tensors that are cut over shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import lora_check
from lora_check.errors import CorruptCheckpointError, UnsafePickleError, UsageError, WrongInputError
from lora_check.locations import open_checkpoint
from tests import corrupt
from tests.test_formats import demand_same, refused, same

PARTS = [{"a": torch.randn(3, 4)}, {"b": torch.randn(5)}, {"c": torch.randn(2, 2)}]
TOGETHER = {name: tensor for part in PARTS for name, tensor in part.items()}


# ------------------------------------------------------------------------------------------- parts, each tensor whole


def test_pickles_with_an_index(tmp_path: Path) -> None:
    index = corrupt.shard(tmp_path, "pytorch_model.bin", PARTS)
    demand_same(open_checkpoint(tmp_path, role="base"), TOGETHER)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    for place in (tmp_path, index):
        refused(CorruptCheckpointError, "names shard pytorch_model-00002-of-00003.bin, which is not there", place)


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_pickles_without_an_index(tmp_path: Path, gone: int) -> None:
    corrupt.shard(tmp_path, "pytorch_model.bin", PARTS).unlink()
    demand_same(open_checkpoint(tmp_path, role="merged"), TOGETHER)
    absent = f"pytorch_model-0000{gone}-of-00003.bin"
    (tmp_path / absent).unlink()
    refused(CorruptCheckpointError, f"{absent} is not there", tmp_path)


def test_pickles_of_two_models_without_an_index(tmp_path: Path) -> None:
    for parts in (PARTS, PARTS[:2]):
        corrupt.shard(tmp_path, "pytorch_model.bin", parts).unlink()
    refused(WrongInputError, "holds 2 checkpoints", tmp_path)


def gguf_file(path: Path, tensors: Mapping[str, np.ndarray], parts: int = 0) -> None:
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=parts)
    writer.add_head_count(4)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def test_gguf_parts_are_one_model_by_folder_and_by_any_part(tmp_path: Path) -> None:
    arrays = {f"blk.{i}.attn_v.weight": np.full((3, 4), i, np.float32) for i in range(5)}
    gguf_file(tmp_path / "m.gguf", arrays, parts=2)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in parts] == [f"m-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    for place in (tmp_path, parts[1]):
        checkpoint = open_checkpoint(place, role="base")
        demand_same(checkpoint, {name: torch.from_numpy(array) for name, array in arrays.items()})
        assert checkpoint.files == tuple(parts)
        assert checkpoint.config["num_attention_heads"] == 4
    shutil.move(parts[2], tmp_path / "m-00004-of-00003.gguf")
    refused(CorruptCheckpointError, "m-00003-of-00003.gguf is not there", tmp_path)
    shutil.move(tmp_path / "m-00004-of-00003.gguf", parts[2])
    shutil.copy(parts[0], parts[2])
    refused(CorruptCheckpointError, "calls it part 0 of 3, but it is part 2 of 3", parts[0])


def test_a_part_of_a_gguf_model_under_another_name_is_told(tmp_path: Path) -> None:
    gguf_file(tmp_path / "m.gguf", {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}, parts=1)
    shutil.move(tmp_path / "m-00001-of-00002.gguf", tmp_path / "alone.gguf")
    refused(CorruptCheckpointError, "calls it part 0 of 2, but it is part 0 of 1", tmp_path / "alone.gguf")


def test_a_folder_must_hold_one_gguf_model(tmp_path: Path) -> None:
    gguf_file(tmp_path / "m-Q8_0.gguf", {"a": np.ones(2, np.float32)})
    assert set(open_checkpoint(tmp_path, role="merged").metas()) == {"a"}
    gguf_file(tmp_path / "m-F16.gguf", {"a": np.ones(2, np.float32)})
    refused(WrongInputError, "holds 2 checkpoints: m-F16.gguf, m-Q8_0.gguf", tmp_path)


# ---------------------------------------------------------------------------------------- shards, each tensor cut

WIDTH, INNER, VOCABULARY, HEADS, GROUPS = 24, 40, 36, 6, 2
LLAMA2, LLAMA3 = 1, 0
"""Along which axis tok_embeddings is cut."""


def model() -> dict[str, Tensor]:
    """A Llama as Meta names it: not square but for wq and wo, every number another."""
    torch.manual_seed(0)
    keys = WIDTH // HEADS * GROUPS
    shapes = {"attention.wq": (WIDTH, WIDTH), "attention.wk": (keys, WIDTH), "attention.wv": (keys, WIDTH)}
    shapes |= {"attention.wo": (WIDTH, WIDTH), "feed_forward.w1": (INNER, WIDTH), "feed_forward.w2": (WIDTH, INNER)}
    shapes |= {"feed_forward.w3": (INNER, WIDTH), "attention_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
    layers = {f"layers.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()}
    ends = {"tok_embeddings.weight": (VOCABULARY, WIDTH), "output.weight": (VOCABULARY, WIDTH)}
    every = {**ends, **layers, "norm.weight": (WIDTH,), "rope.freqs": (2,)}
    return {name: torch.randn(shape).to(torch.bfloat16) for name, shape in every.items()}


def cut(tensors: Mapping[str, Tensor], folder: Path, count: int, embedding: int, **params: Any) -> Path:
    """Cut a model as Meta's model-parallel layers are, and write the shards and params.json."""
    axes = dict.fromkeys(("wo", "w2"), 1) | dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0)
    axes["tok_embeddings"] = embedding
    folder.mkdir(exist_ok=True)
    for number in range(count):
        piece = {}
        for name, tensor in tensors.items():
            axis = axes.get(name.removesuffix(".weight").split(".")[-1])
            piece[name] = (tensor if axis is None else tensor.chunk(count, axis)[number]).clone()
        torch.save(piece, folder / f"consolidated.{number:02d}.pth")
    told = {"dim": WIDTH, "n_heads": HEADS, "n_kv_heads": GROUPS, "vocab_size": -1} | params
    (folder / "params.json").write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    return folder


@pytest.mark.parametrize("embedding", [LLAMA2, LLAMA3])
@pytest.mark.parametrize("told", [True, False])
def test_cut_tensors_are_joined(tmp_path: Path, embedding: int, told: bool) -> None:
    folder = cut(model(), tmp_path, 2, embedding)
    if not told:
        (folder / "params.json").unlink()
    for place in (folder, folder / "consolidated.01.pth"):
        checkpoint = open_checkpoint(place, role="base")
        demand_same(checkpoint, model())
        assert [path.name for path in checkpoint.files] == ["consolidated.00.pth", "consolidated.01.pth"]
    kept = checkpoint.read("norm.weight")
    checkpoint.close()
    assert same(kept, model()["norm.weight"])
    with pytest.raises(UsageError, match="which is closed"):
        checkpoint.read("norm.weight")


def test_one_shard_alone_is_a_model_of_any_names(tmp_path: Path) -> None:
    torch.save({"anything": torch.ones(3)}, tmp_path / "consolidated.00.pth")
    demand_same(open_checkpoint(tmp_path, role="base"), {"anything": torch.ones(3)})


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    folder = cut(model(), tmp_path, 4, LLAMA3, n_kv_heads=None, n_heads=None)
    (folder / "consolidated.03.pth").unlink()
    refused(CorruptCheckpointError, "is joined to (18, 24), but it should be 24 x 24", folder)
    (folder / "consolidated.01.pth").unlink()
    refused(CorruptCheckpointError, "consolidated.01.pth is not there", folder)


def test_heads_of_keys_that_several_shards_repeat_are_not_joined(tmp_path: Path) -> None:
    folder = cut(model(), tmp_path, 2, LLAMA2)
    shards = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))]
    shards[1]["layers.0.attention.wk.weight"] = shards[0]["layers.0.attention.wk.weight"]
    torch.save(shards[1], folder / "consolidated.01.pth")
    checkpoint = open_checkpoint(folder, role="base")
    with pytest.raises(CorruptCheckpointError, match=r"wk.* should be cut, and two shards hold the same piece"):
        checkpoint.read("layers.0.attention.wk.weight")
    (folder / "params.json").write_text(json.dumps({"dim": WIDTH, "n_heads": HEADS, "n_kv_heads": 1}))
    refused(CorruptCheckpointError, "is joined to (8, 24), but it should be 4 x 24", folder)


def test_a_norm_must_be_the_same_in_all_shards(tmp_path: Path) -> None:
    folder = cut(model(), tmp_path, 4, LLAMA2)
    shard = torch.load(folder / "consolidated.02.pth", weights_only=True)
    shard["norm.weight"][5] += 1
    torch.save(shard, folder / "consolidated.02.pth")
    checkpoint = open_checkpoint(folder, role="merged")
    with pytest.raises(
        CorruptCheckpointError, match=r"^merged: tensor 'norm.weight' .* should be the same in all shards"
    ):
        checkpoint.read("norm.weight")
    assert same(checkpoint.read("layers.0.ffn_norm.weight"), model()["layers.0.ffn_norm.weight"])


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"layers.0.moe.gate.weight": torch.ones(4, 4)}, WrongInputError, "'layers.0.moe.gate.weight' of"),
        ({"layers.0.attention.wq.bias": torch.ones(4)}, WrongInputError, "'layers.0.attention.wq.bias' of"),
        ({"norm.weight": None}, WrongInputError, "nothing there tells the width"),
        ({"output.weight": None}, WrongInputError, "the vocabulary not told"),
        ({"layers.1.feed_forward.w2.weight": torch.ones(20, 20)}, CorruptCheckpointError, "should be 24 x any"),
        ({"tok_embeddings.weight": torch.ones(7, 24)}, WrongInputError, "'tok_embeddings.weight' of"),
    ],
)
def test_where_the_cut_cannot_be_known_it_is_not_guessed(tmp_path: Path, change: Any, kind: Any, says: str) -> None:
    folder = cut(model(), tmp_path, 2, LLAMA3)
    (folder / "params.json").unlink()
    for path in folder.glob("*.pth"):
        shard = torch.load(path, weights_only=True) | change
        torch.save({name: tensor for name, tensor in shard.items() if tensor is not None}, path)
    refused(kind, says, folder)


@pytest.mark.parametrize("change", [{"norm.weight": torch.ones(5)}, {"extra": torch.ones(2)}, {"norm.weight": None}])
def test_shards_of_two_models_are_told(tmp_path: Path, change: Mapping[str, Any]) -> None:
    folder = cut(model(), tmp_path, 2, LLAMA2)
    shard = torch.load(folder / "consolidated.01.pth", weights_only=True) | change
    torch.save({name: tensor for name, tensor in shard.items() if tensor is not None}, folder / "consolidated.01.pth")
    refused(CorruptCheckpointError, f"tensor {next(iter(change))!r}", folder)


def test_a_shard_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    folder, sentinel = cut(model(), tmp_path, 2, LLAMA2), tmp_path / "ran"
    torch.save({"w": corrupt.RunsCode(sentinel)}, folder / "consolidated.01.pth")
    refused(UnsafePickleError, "which would run code; it was not run", folder)
    assert not sentinel.exists()


def test_a_merge_in_shards_is_compared_tensor_by_tensor(tmp_path: Path) -> None:
    whole = model()
    base = cut(whole, tmp_path / "base", 2, LLAMA2)
    module = "base_model.model.layers.0.attention.wo"
    factors = {f"{module}.lora_A.weight": torch.randn(3, WIDTH), f"{module}.lora_B.weight": torch.randn(WIDTH, 3)}
    (tmp_path / "adapter").mkdir()
    torch.save(factors, tmp_path / "adapter" / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["wo"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    name = "layers.0.attention.wo.weight"
    delta = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"] * (5 / 3)
    merged = whole | {name: (whole[name].float() + delta).to(torch.bfloat16)}
    for factor, verdict in ((1, "verified"), (1.5, "refuted")):
        changed = merged | {"layers.1.feed_forward.w2.weight": whole["layers.1.feed_forward.w2.weight"] * factor}
        out = cut(changed, tmp_path / "merged", 4, LLAMA3, vocab_size=VOCABULARY)
        assert lora_check.check(base, tmp_path / "adapter", out).verdict.value == verdict

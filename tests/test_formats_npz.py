"""npz: arrays come back as they were saved, nothing is unpickled, and an archive that lies is told."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from safetensors.torch import load_file

import lora_check
from lora_check.errors import CorruptCheckpointError, InputError, UnknownFormatError, UnsafePickleError
from lora_check.locations import open_checkpoint
from tests import corrupt
from tests.test_formats import demand_same, refused


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    floats = {kind: draw.standard_normal((3, 5)).astype(kind) for kind in ("float16", "float32", "float64")}
    whole = {"int64": np.arange(7), "uint8": np.arange(9, dtype=np.uint8), "bool": np.array([True, False, True])}
    odd = {"scalar": np.float32(2.5), "empty": np.zeros((0, 4), np.float32), "a.b/c": np.ones(1, np.float32)}
    turned = {"fortran": np.asfortranarray(floats["float32"]), "cube": np.asfortranarray(draw.random((2, 3, 4)))}
    return floats | whole | {name: np.asarray(array) for name, array in odd.items()} | turned


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays().items()}


@pytest.fixture(params=[np.savez, np.savez_compressed], ids=["stored", "compressed"])
def save(request: pytest.FixtureRequest) -> Callable[..., None]:
    return request.param


def member(array: bytes, *, name: str = "w.npy", path: Path, **how: Any) -> Path:
    """An archive of one member, its bytes given."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), array, **how)
    return path


def saved(array: np.ndarray, **how: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------- round trips


def test_every_array_comes_back(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "m.npz", **arrays())
    checkpoint = open_checkpoint(tmp_path / "m.npz", role="merged")
    demand_same(checkpoint, tensors())
    assert list(checkpoint.metas()) == list(arrays())


def test_raw_items_of_two_bytes_are_bfloat16(tmp_path: Path, save: Callable[..., None]) -> None:
    wide = torch.randn(4, 6).to(torch.bfloat16)
    save(tmp_path / "m.npz", w=wide.view(torch.int16).numpy().view("V2"))
    demand_same(open_checkpoint(tmp_path / "m.npz", role="base"), {"w": wide})


@pytest.mark.parametrize("name", ["weights.npz", "model.npz", "adapters.npz"])
def test_a_folder_with_its_configuration_beside_it(tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / name, **arrays())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path, role="adapter")
    demand_same(checkpoint, tensors())
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.files == (tmp_path / name,)


def test_parts_in_a_folder(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.00.npz", a=np.ones(2))
    np.savez(tmp_path / "weights.01.npz", b=np.zeros(2))
    demand_same(open_checkpoint(tmp_path, role="base"), {"a": torch.ones(2).double(), "b": torch.zeros(2).double()})
    np.savez(tmp_path / "weights.02.npz", b=np.zeros(2))
    refused(CorruptCheckpointError, "tensor 'b' lies in both", tmp_path)
    (tmp_path / "weights.01.npz").unlink()
    refused(CorruptCheckpointError, "weights.01.npz is not there", tmp_path)


def test_a_stored_array_is_mapped_and_its_file_left_alone(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "m.npz", w=np.ones((4, 4), np.float32))
    before = (tmp_path / "m.npz").read_bytes()
    checkpoint = open_checkpoint(tmp_path / "m.npz", role="base")
    kept = checkpoint.read("w")
    kept.zero_()
    checkpoint.close()
    assert (tmp_path / "m.npz").read_bytes() == before
    assert not kept.any()


# ------------------------------------------------------------------------------------------------- what is refused


class Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return corrupt.RunsCode(self.sentinel).__reduce__()


def test_an_array_of_objects_is_refused_and_not_unpickled(tmp_path: Path, save: Callable[..., None]) -> None:
    sentinel = tmp_path / "ran"
    save(tmp_path / "m.npz", fine=np.ones(2), w=np.array([Trap(sentinel), None], dtype=object))
    message = refused(UnsafePickleError, "holds Python objects", tmp_path / "m.npz").message
    assert "'w.npy'" in message
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "array",
    [np.ones(2, ">f4"), np.array(["text"]), np.ones(2, "V1"), np.ones(2, [("x", "<f4")]), np.ones(2, np.longdouble)],
    ids=str,
)
def test_what_torch_lacks_is_listed_but_not_read(tmp_path: Path, array: np.ndarray) -> None:
    np.savez(tmp_path / "m.npz", w=array)
    checkpoint = open_checkpoint(tmp_path / "m.npz", role="base")
    assert checkpoint.metas()["w"].dtype.startswith("numpy ")
    with pytest.raises(UnknownFormatError, match=r"^base: array 'w' of .* cannot be read here"):
        checkpoint.read("w")


def headed(shape: Any, descr: str = "<f4", data: bytes = bytes(16)) -> bytes:
    """An array whose header says this, true or not."""
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


LIES = {
    "a larger shape": (headed((5,)), "'w.npy' of"),
    "a smaller shape": (headed((3,)), "take"),
    "an endless shape": (headed((2**62, 2**62)), "take"),
    "a negative shape": (headed((-4,)), "impossible shape"),
    "another dtype": (headed((4,), "<f8"), "take"),
    "an unknown dtype": (headed((4,), "<q9"), "header of array"),
    "no array": (b"hello, this is no array", "header of array"),
    "nothing": (b"", "header of array"),
    "code for a header": (headed((4,)).replace(b"'shape': (4,)", b"__import__('os')"), "header of array"),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_an_array_that_lies(tmp_path: Path, lie: str) -> None:
    content, says = LIES[lie]
    path = member(content, path=tmp_path / "m.npz")
    assert str(path) in refused(CorruptCheckpointError, says, path).message


def test_an_archive_that_lies(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    for content in (b"", b"hello", corrupt.POINTER.encode(), b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        assert str(path) in refused(CorruptCheckpointError, "", path).message
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for name in ("w.npy", "w.npy"):
            archive.writestr(name, saved(np.ones(2)))
    refused(CorruptCheckpointError, "holds array 'w' twice", path)
    with zipfile.ZipFile(path, "w"):
        pass
    refused(UnknownFormatError, "holds no arrays", path)


def test_a_damaged_compressed_array_is_told_when_it_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "m.npz", w=np.random.default_rng(0).random(2000))
    raw = bytearray((tmp_path / "m.npz").read_bytes())
    raw[len(raw) // 2] ^= 255
    (tmp_path / "m.npz").write_bytes(raw)
    checkpoint = open_checkpoint(tmp_path / "m.npz", role="base")
    with pytest.raises(CorruptCheckpointError, match=r"^base: array 'w' of .* cannot be unpacked"):
        checkpoint.read("w")


def test_no_damage_lets_a_foreign_error_escape(tmp_path: Path, save: Callable[..., None]) -> None:
    path, messages = tmp_path / "m.npz", []
    save(path, **{f"layer.{i}": np.random.default_rng(i).random((3, 4)) for i in range(3)})
    raw = path.read_bytes()
    backwards = (damaged[::-1] for damaged in corrupt.damages(raw[::-1], 150, seed=1))
    cuts = (raw[: len(raw) * quarter // 8] for quarter in range(8))
    for damaged in (*cuts, *corrupt.damages(raw, 150, seed=0), *backwards):
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path, role="base")
            assert all(checkpoint.read(name).shape == meta.shape for name, meta in checkpoint.metas().items())
        except InputError as error:
            messages.append(error.message)
    assert len(messages) > 50
    assert not any("\n" in message for message in messages)


# ---------------------------------------------------------------------------------------------------- in a report


def test_a_merge_saved_by_numpy_is_verified_and_a_broken_one_refuted(world: Any, tmp_path: Path) -> None:
    inputs = world("llama-qv")
    places = []
    for side, folder in (("base", inputs.base), ("adapter", inputs.adapters[0]), ("merged", inputs.merged)):
        (tmp_path / side).mkdir()
        places.append(tmp_path / side)
        for config in folder.glob("*config.json"):
            (tmp_path / side / config.name).write_text(config.read_text())
        loaded = {
            name: tensor.numpy() for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()
        }
        np.savez(tmp_path / side / ("adapters.npz" if side == "adapter" else "weights.npz"), **loaded)
    assert lora_check.check(*places).verdict.value == "verified"
    name = "model.layers.0.self_attn.v_proj.weight"
    loaded[name] = loaded[name] * np.float32(1.5)
    np.savez(tmp_path / "merged" / "weights.npz", **loaded)
    report = lora_check.check(*places)
    assert [one.tensor for one in report.comparisons if one.verdict.value == "refuted"] == [name]

"""Private memory does not grow with the model, and rows that are made one by one are those of the whole tensor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import memory_worlds as worlds
import numpy as np
import pytest
import quantised_files as files
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_check import items, pipeline, sources
from lora_check.assembled import Region, assembled, part
from lora_check.formats import _model_parallel
from lora_check.formats._memory import in_memory
from lora_check.formats.gguf import open_path
from lora_check.links import Piece, Realigned
from lora_check.quantised import decoded
from lora_check.sources import Lines, matrix, rows_of, unsigned_zeros
from lora_check.types import TensorMeta

SCRIPT = Path(__file__).with_name("memory_peak.py")
MEGABYTES = 100
BAR = 64 << 20
SLACK = 2 * 2 * (8 * sources.CHUNK_ELEMENTS)
"""glibc keeps free memory at the top of a heap up to twice the largest block it ever unmapped; the largest here is a
chunk of indices, 8 bytes each. There are two heaps: the main thread's and the worker's."""

SMALL = (
    "bf16",
    "cast",
    "dora",
    "fused_merged",
    "stacked_merged",
    "pickled",
    "npz",
    "gguf_base",
    "nf4",
    "int8",
    "fp8",
    "mxfp4",
)

# ------------------------------------------------------------------------------------------------------- private


Peak = Callable[..., Mapping[str, Any]]


@pytest.fixture(scope="module")
def peak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peak]:
    """Name of a world -> what its check takes at the most; the large one is gone when it has been checked."""
    asked = [sys.executable, str(SCRIPT)]
    with subprocess.Popen(asked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdin is not None
        assert script.stdout is not None

        def ask(name: str, **options: Any) -> Any:
            folder = tmp_path_factory.mktemp(name)
            small, large = (worlds.WORLDS[name](folder / f"{size}", size) for size in (1, MEGABYTES))
            request = {"small": small.locations, "large": large.locations, **options}
            print(json.dumps(request), file=script.stdin, flush=True)
            told = script.stdout.readline()
            shutil.rmtree(folder)
            return json.loads(told)

        yield ask
        script.stdin.close()


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells how much of a process no file holds")
@pytest.mark.parametrize("name", SMALL)
def test_a_check_takes_little_private_memory_whatever_the_size(peak: Peak, name: str) -> None:
    found = peak(name)
    assert found["verdict"] == "verified"
    assert found["peak"] < BAR + SLACK < MEGABYTES * 1_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells how much of a process no file holds")
def test_the_measure_sees_a_tensor_that_is_whole(peak: Peak) -> None:
    assert peak("nf4", whole=True)["peak"] > MEGABYTES * 1_000_000


# ---------------------------------------------------------------------------------------------------------- codes


def nf4(**options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weight = {"x.weight": worlds.numbers(37, 64 * 3)}
    return files.in_4bit(weight, ["x.weight"], **options), {}


def ragged() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rows that no block of 64 ends with; an odd number of elements."""
    tensors, _ = nf4()
    header = next(name for name in tensors if ".quant_state." in name)
    said = json.loads(bytes(tensors[header].tolist())) | {"shape": [41, 173]}
    count = 41 * 173
    made = {
        "x.weight": tensors["x.weight"].repeat(2, 1)[: (count + 1) // 2],
        "x.weight.absmax": tensors["x.weight.absmax"][: -(-count // 64)],
        "x.weight.quant_map": tensors["x.weight.quant_map"],
        header: torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8),
    }
    return made, {}


def fp8(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    *stack, rows, columns = shape
    codes = worlds.numbers(*shape, of=9.0).to(torch.float8_e4m3fn)
    scales = worlds.numbers(*stack, -(-rows // block[0]), -(-columns // block[1])).abs()
    config = {"quantization_config": {"weight_block_size": list(block)}}
    return {"x.weight": codes, "x.weight_scale_inv": scales}, config


def mxfp4() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every power of two that a scale can be, the largest too."""
    parts = files.in_mxfp4(3, 96, 10)
    parts["scales"].view(-1)[:90] = torch.arange(166, 256, dtype=torch.uint8)
    return {f"x_{role}": part for role, part in parts.items()}, {}


CODED: Mapping[str, Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "nf4": nf4,
    "nf4-nested": lambda: nf4(nested=True),
    "fp4": lambda: nf4(kind="fp4"),
    "nf4-ragged": ragged,
    "int8": lambda: (files.in_int8({"x.weight": worlds.numbers(37, 64)}, ["x.weight"]), {}),
    "fp8": lambda: fp8((70, 48), (32, 16)),
    "fp8-ragged": lambda: fp8((70, 50), (32, 16)),
    "fp8-stack": lambda: fp8((3, 64, 48), (32, 16)),
    "fp8-rows": lambda: fp8((40, 48), (1, 48)),
    "mxfp4": mxfp4,
}


@pytest.mark.parametrize("scheme", CODED)
def test_rows_of_codes_are_those_of_the_whole(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, config = CODED[scheme]()
    checkpoint, _ = decoded(in_memory("base", tensors, config), in_memory("merged", {"y": torch.ones(1)}, {}))
    name = next(name for name, meta in checkpoint.metas().items() if meta.codes)
    _same_rows(checkpoint, name, monkeypatch)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "Q6_K", "F32"])
@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.0.ffn_up.weight", "blk.0.attn_q.bias"])
def test_rows_of_a_gguf_file_are_those_of_the_whole(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of q and k in the order of transformers, which is that of the file in none of its heads."""
    shape = (512,) if name.endswith("bias") else (24, 512)
    codes = _codes(shape, Type[kind])
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in (("attention.head_count", 2), ("attention.head_count_kv", 2), ("embedding_length", 512)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tensor(name, codes, raw_dtype=Type[kind])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    checkpoint, _ = decoded(open_path(tmp_path / "x.gguf"), in_memory("merged", {"y": torch.ones(1)}, {}))
    _same_rows(checkpoint, name, monkeypatch)
    if "attn_q" in name and kind == "F32":
        assert not torch.equal(checkpoint.read(name), torch.from_numpy(codes))


def _codes(shape: tuple[int, ...], kind: Type) -> Any:
    """An array in the blocks of a type; the library cannot make those of K types, so their bytes are any."""
    if not kind.name.endswith("_K"):
        return quantize(worlds.numbers(*shape).numpy(), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    bytes_ = np.random.default_rng(5).integers(0, 50, (*shape[:-1], shape[-1] // block * size))
    return bytes_.astype(np.uint8)


def _same_rows(checkpoint: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, bit by bit; in chunks of any size, and in any order."""
    whole, random = checkpoint.read(name), torch.Generator().manual_seed(3)
    assert whole.float().unique().numel() > 8
    for size in (1, 200, 1 << 18):
        monkeypatch.setattr(sources, "CHUNK_ELEMENTS", size)
        for stacked in (False, True):
            seen, wanted = matrix(checkpoint, name, stacked), rows_of(whole, stacked)
            if isinstance(seen, Tensor):  # numbers that lie in the file as they are
                continue
            assert (tuple(seen.shape), seen.dtype) == (tuple(wanted.shape), wanted.dtype)
            for _ in range(12):
                ends = sorted(torch.randint(0, len(wanted) + 1, (2,), generator=random).tolist())
                assert _same(seen[slice(*ends)], wanted[slice(*ends)])
            assert _same(seen[:], wanted)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(*(x.contiguous().view(torch.uint8) for x in (one, other)))


# ------------------------------------------------------------------------------------------------- put together


@st.composite
def regions(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[Region, Region, tuple[int, ...]]]]:
    """A shape, and the regions that it is put together from: where each lies, in what, and of which shape that is."""
    count, height, width = draw(st.integers(1, 3)), draw(st.integers(2, 9)), draw(st.integers(2, 7))
    stacked, turned = draw(st.booleans()), draw(st.booleans())
    long = width if turned else height
    cut = draw(st.integers(1, long - 1))
    found = []
    for expert in range(count) if stacked else [None]:
        for rows in ((0, cut), (cut, long)):
            placed = Region(expert=expert, rows=rows, transposed=turned)
            other, above = draw(st.booleans()), draw(st.integers(0, 2))
            size = rows[1] - rows[0]
            taken = Region(rows=(above, above + size), transposed=other)
            sides = (above + size + 1, height if turned else width)
            found.append((placed, taken, sides[::-1] if other else sides))
    return ((count, height, width) if stacked else (height, width)), found


@given(regions())
def test_rows_of_what_is_put_together_are_those_of_the_whole(made: Any) -> None:
    shape, found = made
    held = {f"s{place}": worlds.numbers(*sides, seed=place) for place, (_, _, sides) in enumerate(found)}
    pieces = [Piece(source=f"s{n}", placed=placed, taken=taken) for n, (placed, taken, _) in enumerate(found)]
    metas = {"x": TensorMeta(name="x", shape=shape, dtype="float32")}
    for inner in (in_memory("base", held, {}), _ByLines(in_memory("base", held, {}))):
        checkpoint = Realigned(inner, {"x": pieces}, metas)
        whole, rows = checkpoint.read("x"), checkpoint.rows("x")
        turned = any(placed.transposed != taken.transposed for placed, taken, _ in found)
        assert isinstance(rows, Lines) or (turned and isinstance(inner, _ByLines))
        for start in range(shape[0]) if rows else ():
            assert torch.equal(rows[start : start + 2], whole[start : start + 2])
        for stacked in (False, True) if rows else ():
            assert torch.equal(matrix(checkpoint, "x", stacked)[:], rows_of(whole, stacked))


class _ByLines:
    """A checkpoint that has to make its rows."""

    location, config = "base", {}

    def __init__(self, inner: Any) -> None:
        self.read = inner.read

    def rows(self, name: str) -> Lines:
        tensor = self.read(name)
        return Lines(shape=tuple(tensor.shape), dtype=tensor.dtype, make=lambda lines: tensor[lines].clone())


def test_a_region_that_is_one_row_off_gives_other_rows() -> None:
    source = worlds.numbers(5, 3)
    one = part(Region(), (2, 3), Region(rows=(1, 3)), source)
    assert one is not None
    made = assembled((2, 3), torch.float32, [one])[:]
    assert torch.equal(made, source[1:3])
    assert not torch.equal(made, source[0:2])


@pytest.mark.parametrize("cut", [0, 1])
def test_rows_of_shards_are_those_of_the_whole(cut: int) -> None:
    pieces = [worlds.numbers(6, 4, seed=seed) for seed in range(3)]
    rows = _model_parallel._assembled(tuple(torch.cat(pieces, cut).shape), pieces, cut)
    assert torch.equal(rows[1:5], torch.cat(pieces, cut)[1:5])
    assert torch.equal(rows[:], torch.cat(pieces, cut))


# -------------------------------------------------------------------------------------------------------- a check


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "PIECE_BYTES", 1 << 13)


@pytest.mark.parametrize("scheme", ["nf4", "int8", "fp8"])
def test_a_base_in_codes_is_compared_by_rows_and_a_mistake_in_one_is_found(
    scheme: str, divided: None, tmp_path: Path
) -> None:
    made = files.model(tmp_path)
    encode, decode = (getattr(files, f"{way}_{scheme.replace('nf4', '4bit')}") for way in ("in", "from"))
    names = [*files.TARGETS, f"{files.LAYER}.mlp.up_proj.weight"]
    base = encode(made.tensors, names)
    merged = made.merged(decode(base))
    plan = pipeline.plan(base, made.adapter, merged)
    several = [one.merged.name for one in plan.pairings if len(items.pieces(one)) > 1]
    assert {names[0], names[2]} <= set(several)
    assert pipeline.check(base, made.adapter, merged, jobs=1).verdict.value == "verified"
    for name in (names[0], names[2]):
        for row in (0, -1):
            wrong = files.changed(merged, name, row, lambda x: x + 1)
            report = pipeline.check(base, made.adapter, wrong, jobs=1)
            assert [one.tensor for one in report.comparisons if one.verdict.value == "refuted"] == [name]


@pytest.mark.parametrize("split", [False, True], ids=["whole", "pieces"])
def test_the_sign_of_a_decoded_zero_proves_nothing(split: bool, tmp_path: Path, monkeypatch: Any) -> None:
    if split:
        monkeypatch.setattr(items, "PIECE_BYTES", 1 << 10)
    made, name = files.model(tmp_path), f"{files.LAYER}.mlp.up_proj.weight"
    spoiled = made.tensors | {name: made.tensors[name].clone()}
    spoiled[name][5, 7] = 0.0
    base = files.in_4bit(spoiled, [name])
    merged = made.merged(files.from_4bit(base))
    assert merged[name][5, 7] == 0
    merged[name][5, 7] = -merged[name][5, 7]
    assert pipeline.check(base, made.adapter, merged, jobs=1).verdict.value == "verified"
    merged[name][6, 7] = -merged[name][6, 7]
    report = pipeline.check(base, made.adapter, merged, jobs=1)
    assert [one.tensor for one in report.comparisons if one.verdict.value == "refuted"] == [name]


def test_a_matrix_does_what_a_tensor_does() -> None:
    whole = worlds.numbers(6, 5)
    whole[2, 3] = -0.0
    lines = Lines(shape=(6, 5), dtype=torch.float32, make=lambda span: whole[span])
    seen = unsigned_zeros(sources.Matrix(source=lines))
    assert (len(seen), seen.shape.numel(), seen.numel(), seen.ndim) == (6, 30, 30, 2)
    assert seen.is_floating_point()
    assert seen.stride() == whole.stride()
    assert torch.equal(seen[1:4, 2:], whole[1:4, 2:])
    assert torch.equal(seen[[4, 0]], whole[[4, 0]])
    assert torch.equal(torch.cat([seen, whole]), torch.cat([whole, whole]))
    assert bool((whole == seen).all())
    assert seen.abs().max() == whole.abs().max()
    assert not torch.signbit(seen[2:3])[0, 3]
    assert torch.signbit(whole)[2, 3]
    assert seen.new_ones((1, 1)).dtype is torch.float32
    with pytest.raises(AttributeError):
        _ = seen.no_such_thing


# ----------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize(
    ("name", "because"),
    [
        ("legacy_pickle", "a file cannot be mapped"),
        ("npz_packed", "a file cannot be mapped"),
        ("pickled", ""),
        ("npz", ""),
        ("nf4", ""),
        ("fused_merged", ""),
    ],
)
def test_what_is_whole_in_memory_is_planned(name: str, because: str, tmp_path: Path, capsys: Any) -> None:
    from lora_check.__main__ import main

    made = worlds.WORLDS[name](tmp_path, 1)
    assert main(["plan", *made.locations, "--json", str(tmp_path / "plan.json")]) == 0
    told = json.loads((tmp_path / "plan.json").read_text())["held_whole"]
    assert {one["because"] for one in told} == ({because} if because else set())
    assert ("held whole in memory: 1 tensor, the largest" in capsys.readouterr().out) is bool(because)


def test_a_formula_that_reads_the_whole_weight_is_planned() -> None:
    from lora_check import registry
    from lora_check.types import Pairing, Step

    meta = TensorMeta(name="x", shape=(40, 30), dtype="bfloat16", codes="nf4", packed=700)
    recipes = registry.load("recipes")
    told = {
        name: items.whole_because(
            Pairing(merged=meta, base=meta, steps=(Step(recipe=recipes[name], adapter=0),), module="x")
        )
        for name in ("pissa-base", "lora-linear", "dora-linear")
    }
    assert told == {"pissa-base": "a formula reads the whole weight", "lora-linear": "", "dora-linear": ""}
    assert items.numbers_of(Pairing(merged=meta, base=meta, steps=(), module="x")) == 40 * 30 * 2

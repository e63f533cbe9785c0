"""Shapes and workloads of the latency benchmark: sizes against published ones, forwards against other ones."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.latency import plugins, problem, shapes
from benchmarks.latency.nouns import Cell, Place, Subject, Workload
from benchmarks.latency.workloads import _bytes, _decoder
from lora_check.errors import UsageError

PLACE = Place(device="cpu", cache=20_000)
PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b": 7_248_023_552,
    "smollm2-135m": 134_515_008,
}
KINDS = ("llama", "qwen2", "mistral")
CELLS = {
    "linear": Cell(workload="linear", shape="tiny-llama/k", batch=2, length=3, rank=5, dtype="float32"),
    "linear-bias": Cell(workload="linear", shape="tiny-qwen2/v", batch=1, length=3, rank=6),
    "linear-hot": Cell(workload="linear", shape="tiny-llama/down", batch=2, rank=5, cache="hot"),
    "block-decode": Cell(workload="block", shape="tiny-qwen2", batch=3, context=7, rank=5),
    "block-prefill": Cell(
        workload="block", shape="tiny-mistral", batch=2, length=9, rank=6, targets=("q_proj", "v_proj")
    ),
    "model-decode": Cell(workload="model", shape="tiny-llama", batch=2, context=11, rank=5),
    "model-first": Cell(workload="model", shape="tiny-llama", batch=2, rank=5),
    "model-tied": Cell(workload="model", shape="tiny-qwen2", batch=3, length=8, rank=6, targets=("down_proj",)),
    "mixed-linear": Cell(workload="mixed", shape="tiny-llama/up", batch=7, length=2, rank=5, adapters=3),
    "mixed-block": Cell(workload="mixed", shape="tiny-llama", batch=4, context=3, rank=5, adapters=4),
}


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    """Each test makes its own bases."""
    problem.release()
    yield
    problem.release()


def workload(cell: Cell) -> Workload:
    return plugins.load("workloads")[cell.workload]


def made(cell: Cell, place: Place = PLACE) -> Subject:
    return workload(cell).make(cell, place)


def outputs(subject: Subject) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [
            subject.call(module, inputs).clone() for module, inputs in zip(subject.copies, subject.inputs, strict=True)
        ]


# -------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_has_the_published_number_of_parameters(name: str) -> None:
    assert shapes.decoder(name).parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", [*PUBLISHED, "small", *(f"tiny-{kind}" for kind in KINDS)])
def test_transformers_builds_what_the_table_says(name: str) -> None:
    shape = replace(shapes.decoder(name), layers=2)
    with torch.device("meta"):
        model = _decoder.classes(shape, "ForCausalLM")(_decoder.configuration(shape))
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
    layer = model.model.layers[1]
    assert sum(parameter.numel() for parameter in layer.parameters()) == shape.layer_parameters
    found = {path: tuple(one.weight.shape) for path, one in layer.named_modules() if hasattr(one, "in_features")}
    assert found == dict(shape.linears)
    assert getattr(model.config, "sliding_window", None) is None, "none of these attends to a window only"


def test_a_module_is_one_of_its_model() -> None:
    assert shapes.module("llama-3-8b/k") == shapes.Module(name="k_proj", rows=1024, columns=4096, bias=False)
    assert shapes.module("qwen2.5-7b/down") == shapes.Module(name="down_proj", rows=3584, columns=18944, bias=False)
    assert shapes.module("qwen2.5-0.5b/q").bias
    assert not shapes.module("qwen2.5-0.5b/o").bias


@pytest.mark.parametrize("name", ["llama-9", "llama-9/q", "llama-3-8b/lm_head", "llama-3-8b/", "/q", ""])
def test_an_unknown_shape_is_an_error_that_names_the_known(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        shapes.module(name) if shapes.is_module(name) else shapes.decoder(name)
    assert "one of" in caught.value.hint


def test_an_unknown_target_is_an_error() -> None:
    with pytest.raises(UsageError, match="lm_head"):
        shapes.targets(("q_proj", "lm_head"))
    assert shapes.targets(("v_proj", "q_proj")) == ("self_attn.q_proj", "self_attn.v_proj")
    assert len(shapes.targets(())) == 7


# ------------------------------------------------------------------------------------------------------ subjects


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_a_subject_is_what_its_cell_says(cell: Cell) -> None:
    subject = made(cell)
    sizes = workload(cell).modules(cell)
    assert len(subject.copies) == len(subject.sites) == len(subject.inputs)
    for module, sites in zip(subject.copies, subject.sites, strict=True):
        assert tuple(sites) == subject.targets
        assert [tuple(site.base.weight.shape) for site in sites.values()] == list(sizes)
        for target, site in sites.items():
            rows, columns = site.base.weight.shape
            assert module.get_submodule(target) is site.base
            assert site.a.shape == (cell.adapters, cell.rank, columns)
            assert site.b.shape == (cell.adapters, rows, cell.rank)
            assert site.a.dtype == site.b.dtype == site.base.weight.dtype == getattr(torch, cell.dtype)
            assert site.s not in (0.5, 1.0, 2.0)
            assert site.b.any(dim=2).all()
        assert not module.training
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())
    assert {output.shape[0] for output in outputs(subject)} == {cell.batch}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_equal_inputs_give_equal_outputs_and_other_inputs_other_ones(cell: Cell) -> None:
    subject = made(cell)
    buffers = [[id(one) for one in inputs] for inputs in subject.inputs]
    first, again = outputs(subject), outputs(subject)
    assert all(map(torch.equal, first, again))
    subject.refill(5)
    other = outputs(subject)
    assert not any(map(torch.equal, first, other))
    subject.refill(0)
    assert all(map(torch.equal, first, outputs(subject)))
    assert buffers == [[id(one) for one in inputs] for inputs in subject.inputs]


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_copies_outrun_the_cache_and_share_nothing(cell: Cell) -> None:
    subject = made(cell)
    weights = [dict(module.named_parameters()) for module in subject.copies]
    read = [
        sum(one.nbytes for name, one in found.items() if "embed" not in name or "lm_head.weight" not in found)
        for found in weights
    ]
    norms = sum(one.nbytes for one in weights[0].values() if one.ndim == 1)
    if cell.cache == "hot":
        assert len(subject.copies) == 1
        return
    assert len(subject.copies) > 1
    assert sum(read) >= problem.OUTRUN * PLACE.cache > sum(read[:-1]) - len(read) * norms
    pointers = [one.data_ptr() for found in weights for one in found.values()]
    assert len(set(pointers)) == len(pointers)
    for name, one in weights[0].items():
        assert not any(torch.equal(one, found[name]) for found in weights[1:])
    firsts = [next(iter(sites.values())) for sites in subject.sites]
    assert not torch.equal(firsts[0].b, firsts[1].b)
    assert not torch.equal(subject.inputs[0][0], subject.inputs[1][0])  # type: ignore[arg-type]


def test_ten_copies_of_4096_by_4096_outrun_60_mebibytes() -> None:
    gpu = Place(device="cuda", cache=60 << 20)
    cell = Cell(workload="linear", shape="llama-3-8b/q")
    assert _bytes.module_size(cell, gpu)[0] == 10
    assert _bytes.module_size(replace(cell, shape="llama-3-8b/up"), gpu)[0] == 3
    assert _bytes.module_size(replace(cell, cache="hot"), gpu)[0] == 1
    assert _bytes.model_size(Cell(workload="model", shape="llama-3-8b"), gpu)[0] == 1


# ----------------------------------------------------------------------------------------------------- the adapters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_delta_is_as_large_as_the_weight(dtype: str) -> None:
    """Of B only its rounding is left over: half an ulp of each element, so u s |B| |A| of the delta."""
    cell = replace(CELLS["mixed-linear"], dtype=dtype)
    for site in (one["up_proj"] for one in made(cell).sites):
        weight = site.base.weight.double().numpy()
        for a, b in zip(site.a.double().numpy(), site.b.double().numpy(), strict=True):
            u = torch.finfo(site.a.dtype).eps / 2
            rounded = u * np.linalg.norm(site.s * np.abs(b) @ np.abs(a))
            summed = weight.size * torch.finfo(torch.float64).eps / 2 * np.linalg.norm(weight)
            difference = np.linalg.norm(site.s * b @ a) - np.linalg.norm(weight)
            assert abs(difference) <= rounded + summed


def test_the_sequences_of_a_batch_take_the_adapters_in_turn_and_not_sorted() -> None:
    for cell in (CELLS["mixed-linear"], CELLS["mixed-block"], replace(CELLS["mixed-block"], batch=5, adapters=2)):
        chosen = next(iter(made(cell).sites[0].values())).chosen
        assert chosen is not None
        taken = chosen.tolist()
        assert len(taken) == cell.batch
        assert taken != sorted(taken)
        counts = [taken.count(adapter) for adapter in range(cell.adapters)]
        assert max(counts) - min(counts) <= 1
        assert min(counts) > 0
    assert next(iter(made(CELLS["linear"]).sites[0].values())).chosen is None


# ------------------------------------------------------------------------------------------- against other forwards


CLOSE = {"rtol": 0.0, "atol": 200 * 2.0**-24}
"""Of numbers near 1, all in float64 but for the norms of transformers and the softmax of its eager attention: two
layers of two norms and a softmax over a dozen places, in float32, are fewer than two hundred roundings."""


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_logits_of_the_whole_sequence(kind: str) -> None:
    """transformers' own eager attention, masks and growing cache, on tokens that ours sees one by one."""
    cell = Cell(workload="model", shape=f"tiny-{kind}", batch=2, context=11, rank=5, dtype="float64", cache="hot")
    subject = made(cell)
    (model,), ((ids, at, past),) = subject.copies, subject.inputs
    tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(3))
    theirs = theirs_of(model)
    whole = theirs(input_ids=tokens, use_cache=False).logits
    grown = theirs(input_ids=tokens[:, :-1], use_cache=True).past_key_values
    for layer, keys, values in zip(grown.layers, past.keys, past.values, strict=True):  # type: ignore[attr-defined]
        keys[:, :, :-1], values[:, :, :-1] = layer.keys, layer.values
    ids.copy_(tokens[:, -1:])  # type: ignore[attr-defined]
    ours = subject.call(model, (ids, at, past))
    torch.testing.assert_close(ours, whole[:, -1:], **CLOSE)
    assert not torch.allclose(whole[:, -1:], whole[:, -2:-1], **CLOSE)
    if kind == "llama":
        keys[:, :, 4] += 1
        assert not torch.allclose(subject.call(model, (ids, at, past)), whole[:, -1:], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_gives_the_logits_of_the_last_position(kind: str) -> None:
    cell = Cell(workload="model", shape=f"tiny-{kind}", batch=2, length=13, rank=5, dtype="float64", cache="hot")
    subject = made(cell)
    ours = outputs(subject)[0]
    whole = theirs_of(subject.copies[0])(input_ids=subject.inputs[0][0], use_cache=False).logits
    assert ours.shape == (2, 1, 97)
    torch.testing.assert_close(ours, whole[:, -1:], **CLOSE)


def theirs_of(model: Any) -> Any:
    """Another model on the same numbers, with the attention that transformers writes out in products and a softmax."""
    shape = shapes.decoder(f"tiny-{model.config.model_type}")
    config = _decoder.configuration(shape)
    config._attn_implementation = "eager"
    theirs = type(model)(config).double().eval().requires_grad_(False)
    theirs.model.rotary_emb = _decoder.classes(shape, "RotaryEmbedding")(config=config)
    theirs.load_state_dict(model.state_dict())
    return theirs


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_decodes_what_it_gives_in_prefill(kind: str) -> None:
    prefill = Cell(workload="block", shape=f"tiny-{kind}", batch=2, length=9, rank=5, dtype="float64", cache="hot")
    before = made(prefill)
    (layer,), ((x, cosine, sine, nothing),) = before.copies, before.inputs
    assert nothing is None
    seen = Recording()
    whole = before.call(layer, (x, cosine, sine, seen))
    torch.testing.assert_close(before.call(layer, (x, cosine, sine, None)), whole, rtol=0, atol=0)
    after = made(replace(prefill, length=1, context=8))
    (again,), ((newest, *angles, past),) = after.copies, after.inputs
    assert again is layer
    past.keys[0][:, :, :-1], past.values[0][:, :, :-1] = seen.key[:, :, :-1], seen.value[:, :, :-1]  # type: ignore[attr-defined]
    newest.copy_(x[:, -1:])  # type: ignore[attr-defined, index]
    torch.testing.assert_close(after.call(layer, (newest, *angles, past)), whole[:, -1:], **CLOSE)
    assert not torch.allclose(after.call(layer, (newest, cosine[:, :1], sine[:, :1], past)), whole[:, -1:], **CLOSE)  # type: ignore[index]


class Recording:
    """A cache that gives back what it is given, and keeps it."""

    key: torch.Tensor
    value: torch.Tensor

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, ...]:
        self.key, self.value = key, value
        return key, value


def test_smollm2_knows_its_capital() -> None:
    """Its real weights are in the right places, with the right angles and norms."""
    cell = Cell(workload="model", shape="smollm2-135m-real", batch=1, length=5, rank=5, cache="hot")
    assert workload(cell).missing(cell, PLACE) == ""
    subject = made(cell)
    subject.inputs[0][0].copy_(torch.tensor([[504, 3575, 282, 4649, 314]]))  # type: ignore[attr-defined]
    assert outputs(subject)[0][0, -1].argmax() == 7042, "the capital of France is Paris"


# ------------------------------------------------------------------------------------------------- CUDA graphs


class OnlyMeta(TorchDispatchMode):
    """Refuses results that lie anywhere else: a tensor made on the host would be copied, and a capture would break."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                raise RuntimeError(f"{func} made a tensor on {tensor.device}")
        return result


def dataless(subject: Subject) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    """The first copy and its inputs on the device that has shapes and no data."""

    def moved(one: Any) -> Any:
        if isinstance(one, _decoder.FixedCache):
            return _decoder.FixedCache([key.to("meta") for key in one.keys], [value.to("meta") for value in one.values])
        return one.to("meta") if isinstance(one, torch.Tensor) else one

    return subject.copies[0].to("meta"), tuple(map(moved, subject.inputs[0]))


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_a_forward_neither_looks_at_data_nor_makes_any_on_the_host(cell: Cell) -> None:
    subject = made(cell)
    module, inputs = dataless(subject)
    with torch.inference_mode(), OnlyMeta():
        assert subject.call(module, inputs).is_meta


def test_with_their_masks_a_forward_looks_at_data() -> None:
    """The control of the test above: the same model, with the attention that transformers has by default."""
    subject = made(CELLS["model-tied"])
    model, inputs = dataless(subject)
    model.config._attn_implementation = "sdpa"  # type: ignore[union-attr]
    with torch.inference_mode(), OnlyMeta(), pytest.raises((RuntimeError, NotImplementedError)):
        subject.call(model, inputs)


# -------------------------------------------------------------------------------------------------------- memory


def storages(one: Any) -> dict[int, int]:
    """Address -> bytes of all that something holds, each storage once."""
    if isinstance(one, torch.nn.Module):
        return storages([*one.parameters(), *one.buffers()])
    if isinstance(one, _decoder.FixedCache):
        return storages([*one.keys, *one.values])
    if isinstance(one, torch.Tensor):
        return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()}
    if isinstance(one, list | tuple):
        return {address: size for each in one for address, size in storages(each).items()}
    assert one is None
    return {}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_the_bytes_that_are_foretold_are_those_that_are_held(cell: Cell) -> None:
    foretold = {"l": _bytes.module_size, "b": _bytes.layer_size, "m": _bytes.model_size}
    kind = cell.workload[0] if cell.workload != "mixed" else "l" if shapes.is_module(cell.shape) else "b"
    count, one = foretold[kind](cell, PLACE)
    subject = made(cell)
    sites = [[each.a, each.b, each.chosen] for sites in subject.sites for each in sites.values()]
    held = storages([*subject.copies, *subject.inputs, sites])
    assert count == len(subject.copies)
    assert count * one == sum(held.values())


def test_what_does_not_fit_is_missing_with_its_size() -> None:
    whole = Cell(workload="model", shape="llama-3-70b", batch=99, context=8191, adapters=99, dtype="float64")
    words = workload(whole).missing(whole, PLACE).split()
    assert words[0] == "needs"
    assert float(words[1]) * 1e9 > 90 * 8 * PUBLISHED["llama-3-70b"], "the base, and 99 merged copies of most of it"
    for cell in CELLS.values():
        assert workload(cell).missing(cell, PLACE) == ""


def test_what_cannot_be_is_missing_with_its_reason() -> None:
    few, chunk, alone = (
        replace(CELLS["mixed-block"], batch=3),
        replace(CELLS["block-decode"], length=2),
        replace(CELLS["mixed-linear"], adapters=1),
    )
    assert "as many sequences" in workload(few).missing(few, PLACE)
    assert "for decoding" in workload(chunk).missing(chunk, PLACE)
    assert "two adapters" in workload(alone).missing(alone, PLACE)
    assert "pip install no_such_package" in _bytes.uninstalled("torch", "no_such_package")


def test_one_base_serves_the_cells_of_a_shape_and_is_let_go_for_another() -> None:
    first, second = made(CELLS["model-decode"]), made(replace(CELLS["model-first"], rank=6))
    assert first.copies[0] is second.copies[0]
    assert first.sites[0][first.targets[0]].a.shape != second.sites[0][second.targets[0]].a.shape
    gone = weakref.ref(first.copies[0].lm_head.weight)
    del first, second
    gc.collect()
    assert gone() is not None
    made(CELLS["linear"])
    gc.collect()
    assert gone() is None


def test_listing_the_workloads_imports_no_library() -> None:
    code = (
        "import sys; from benchmarks.latency import plugins, nouns\n"
        "found = plugins.load('workloads'); cell = nouns.Cell(workload='model', shape='llama-3-8b')\n"
        "assert len(found['model'].modules(cell)) == 224 and list(found) == ['linear', 'block', 'model', 'mixed']\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    root = Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert ran.stdout.strip() == "set()"

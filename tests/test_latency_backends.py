"""Every backend of the latency benchmark computes what it says, from the same shared base, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.latency import backends as folder
from benchmarks.latency.backends import _compile, _kernel_place, _peft, dora
from benchmarks.latency.budget import lora
from benchmarks.latency.nouns import Place, Site
from benchmarks.latency.plugins import load

ONE = ("merged", "two_gemm", "eager", "peft_float32", "peft_storage", "merge_inside", "dora")
MANY = ("merged_copies", "peft_mixed", "looped", "gathered")
COMPILED = ("compiled", "compiled_plain")
KERNELS = ("triton_fused", "triton_expand")

CPU = Place(device="cpu", cache=1 << 20)
GPU = Place(device="cuda", cache=1 << 20)
DTYPES = (torch.float32, torch.bfloat16)
INPUTS, OUTPUTS, RANK, ALPHA, ADAPTERS = 48, 36, 5, 12, 4
CHOSEN = (2, 0, 3, 2, 0, 3)
"""Not in order, and nobody has adapter 1."""
ROOT = Path(__file__).parents[1]


def site_of(
    name: str, dtype: torch.dtype, *, bias: bool = True, chosen: tuple[int, ...] = CHOSEN, seed: int = 0
) -> Site:
    """Random numbers of the usual sizes; the base asks for gradients, as a fresh layer does."""
    torch.manual_seed(seed)
    many = name in MANY
    adapters = ADAPTERS if many else 1
    base = nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype)
    a = (torch.randn(adapters, RANK, INPUTS) / INPUTS**0.5).to(dtype)
    b = (torch.randn(adapters, OUTPUTS, RANK) * 0.2).to(dtype)
    return Site(base=base, a=a, b=b, s=ALPHA / RANK, chosen=torch.tensor(chosen) if many else None)


def inputs_of(dtype: torch.dtype, *lead: int) -> torch.Tensor:
    return torch.randn(*lead, INPUTS).to(dtype)


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def expected(name: str, site: Site, x: torch.Tensor) -> np.ndarray:
    """The formula in NumPy, in float64: sequence by sequence, from W' as a matrix."""
    weight, shift = wide(site.base.weight), 0 if site.base.bias is None else wide(site.base.bias)
    names = [0] * len(x) if site.chosen is None else site.chosen.tolist()
    y = []
    for rows, adapter in zip(wide(x).reshape(len(names), -1, INPUTS), names, strict=True):
        merged = weight + site.s * wide(site.b[adapter]) @ wide(site.a[adapter])
        if name == "dora":
            merged = merged * (wide(dora.magnitude(site)) / np.linalg.norm(merged, axis=1))[:, None]
        y.append(rows @ merged.T + shift)
    return np.stack(y).reshape(*x.shape[:-1], OUTPUTS)


def share(name: str, site: Site, x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest error over its budget."""
    _, budget = (load("backends")[name].reference or lora)(site, x)
    return float((np.abs(wide(y) - expected(name, site, x)) / wide(budget)).max())


def altered(site: Site) -> Site:
    """What a backend would compute that takes the scale for 1, or the next sequence's adapter for that of this one."""
    moved = None if site.chosen is None else site.chosen.roll(1)
    return Site(base=site.base, a=site.a, b=site.b, s=site.s if site.chosen is not None else 1.0, chosen=moved)


def test_each_file_has_its_case() -> None:
    files = {file.stem for file in Path(folder.__path__[0]).glob("*.py") if not file.stem.startswith("_")}
    assert files == {*ONE, *MANY, *COMPILED, *KERNELS} == set(load("backends"))


def test_who_serves_what() -> None:
    found = load("backends")
    assert {name for name, one in found.items() if one.many} == set(MANY)
    assert {name for name, one in found.items() if one.one} == {*ONE, *COMPILED, *KERNELS}
    assert {name for name, one in found.items() if one.merged} == {"merged", "merged_copies"}
    assert [name for name, one in found.items() if one.reference] == ["dora"]
    assert len({one.place for one in found.values()}) == len(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*ONE, *MANY])
def test_computes_the_formula(name: str, dtype: torch.dtype) -> None:
    for bias, lead in ((True, (6, 3)), (False, (6, 1)), (False, (12,))):
        site, x = site_of(name, dtype, bias=bias), inputs_of(dtype, *lead)
        y = load("backends")[name].build(site)(x)
        assert y.shape == (*lead, OUTPUTS)
        assert y.dtype == dtype
        assert share(name, site, x, y) <= 1
        wrong = load("backends")[name].build(altered(site))(x)
        assert share(name, site, x, wrong) > 1


@pytest.mark.parametrize("name", MANY)
def test_batches_that_come_sorted_or_with_one_sequence_each(name: str) -> None:
    for chosen in ((0, 0, 1, 3), (0, 1, 2, 3), (1,)):
        site, x = site_of(name, torch.float32, chosen=chosen), inputs_of(torch.float32, len(chosen), 2)
        assert share(name, site, x, load("backends")[name].build(site)(x)) <= 1


@pytest.mark.parametrize("name", [*ONE, *MANY])
def test_base_is_shared_and_left_alone(name: str) -> None:
    site, x = site_of(name, torch.bfloat16), inputs_of(torch.bfloat16, 6, 2)
    before = [one.detach().clone() for one in (site.base.weight, site.base.bias, site.a, site.b, x)]
    module = load("backends")[name].build(site)
    module(x), module(x)
    for one, was in zip((site.base.weight, site.base.bias, site.a, site.b, x), before, strict=True):
        assert torch.equal(one, was)
    assert site.base.training
    assert site.base.weight.requires_grad
    assert not hasattr(site.base, "lora_A")
    held = {one.untyped_storage().data_ptr() for one in (*module.parameters(), *module.buffers())}
    copied = load("backends")[name].merged
    assert (site.base.weight.untyped_storage().data_ptr() in held) == (not copied)


@pytest.mark.parametrize("name", [*ONE, *MANY])
def test_each_call_computes_anew(name: str) -> None:
    site, x, other = site_of(name, torch.float32), inputs_of(torch.float32, 6, 2), inputs_of(torch.float32, 6, 2)
    module = load("backends")[name].build(site)
    y = module(x)
    kept = y.clone()
    z = module(other)
    assert torch.equal(y, kept)
    assert share(name, site, other, z) <= 1 < share(name, site, x, z)
    assert torch.equal(module(x), kept)


@pytest.mark.parametrize("name", [*ONE, *MANY])
def test_nothing_learns(name: str) -> None:
    module = load("backends")[name].build(site_of(name, torch.float32))
    y = module(inputs_of(torch.float32, 6, 2))
    assert not y.requires_grad
    assert not any(one.requires_grad for one in module.parameters())
    assert site_of(name, torch.float32).base(inputs_of(torch.float32, 6, 2)).requires_grad  # the base alone would


@pytest.mark.parametrize("name", ["peft_float32", "peft_storage", "peft_mixed", "dora"])
def test_pefts_own_layer_with_the_numbers_of_the_site(name: str) -> None:
    from peft.tuners.lora.layer import Linear

    backend, site = load("backends")[name], site_of(name, torch.bfloat16)
    built = backend.build(site)
    layer = getattr(built, "layer", built)
    assert type(layer) is Linear
    assert not layer.training
    assert set(layer.lora_A) == {str(i) for i in range(len(site.a))}
    for i, adapter in enumerate(layer.lora_A):
        assert layer.scaling[adapter] == site.s
        assert str(layer.lora_A[adapter].weight.dtype) == f"torch.{backend.adapter or 'bfloat16'}"
        assert torch.equal(layer.lora_A[adapter].weight.bfloat16(), site.a[i])
        assert torch.equal(layer.lora_B[adapter].weight.bfloat16(), site.b[i])


def test_pefts_merge_of_that_layer_is_merged() -> None:
    site = site_of("peft_float32", torch.float32)
    ours, before = load("backends")["merged"].build(site).weight, site.base.weight.detach().clone()
    layer = load("backends")["peft_float32"].build(site)
    layer.merge()  # in place, so into the shared weight
    theirs = layer.base_layer.weight
    formula = wide(before) + site.s * wide(site.b[0]) @ wide(site.a[0])
    sizes = np.abs(wide(before)) + site.s * np.abs(wide(site.b[0])) @ np.abs(wide(site.a[0]))
    allowed = (RANK + 3) * 2.0**-24 * 1.001 * sizes
    assert (np.abs(wide(theirs) - formula) <= allowed).all()
    assert (np.abs(wide(ours) - formula) <= allowed).all()
    assert (np.abs(wide(before) - formula) > allowed).any()


def test_merged_is_stored_as_a_checkpoint_stores_it() -> None:
    site = site_of("merged", torch.bfloat16)
    exact = wide(site.base.weight) + site.s * wide(site.b[0]) @ wide(site.a[0])
    found = load("backends")["merged"].build(site).weight
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.from_numpy(exact).bfloat16())  # of these numbers none is near a tie


def test_dora_is_neither_lora_nor_without_its_magnitude() -> None:
    site, x = site_of("dora", torch.float32), inputs_of(torch.float32, 6, 2)
    y = load("backends")["dora"].build(site)(x)
    reference, budget = dora.reference(site, x)
    assert np.allclose(wide(reference), expected("dora", site, x), rtol=1e-12, atol=1e-12)
    assert (budget < 1e-3).all()
    assert ((y.double() - lora(site, x)[0]).abs() > budget).any()
    factors = wide(dora.magnitude(site)) / np.linalg.norm(wide(site.base.weight), axis=1)
    assert set(np.round(factors, 6)) == set(dora.FACTORS)


def test_dora_of_a_row_that_cancels_is_refused() -> None:
    site = site_of("dora", torch.float32, bias=False)
    with torch.no_grad():
        site.base.weight[0] = -(site.s * site.b[0] @ site.a[0])[0]
    with pytest.raises(AssertionError, match="cancels"):
        dora.reference(site, inputs_of(torch.float32, 2))


def test_compiled_once_for_all_modules_of_a_shape() -> None:
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["stats"]
    for name in COMPILED:
        before = frames["unique_graphs"]
        for seed in (1, 2):
            site, x = site_of(name, torch.float32, bias=False, seed=seed), inputs_of(torch.float32, 3, 2)
            with torch.inference_mode():
                y = load("backends")[name].build(site)(x)
            assert share(name, site, x, y) <= 1 < share(name, altered(site), x, y)
        assert frames["unique_graphs"] - before == 1
    torch._dynamo.reset()


def test_what_cannot_be_compiled_whole_is_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        _compile.compiled(Broken())(torch.ones(2))
    torch._dynamo.reset()


def test_missing_says_why_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = load("backends")
    assert {name for name, one in found.items() if one.missing(CPU)} == set(KERNELS)
    assert "GPU" in found["triton_fused"].missing(CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in found["compiled_plain"].missing(CPU)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(_compile.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "headers" in found["compiled"].missing(CPU)
    monkeypatch.setattr(_peft, "find_spec", lambda _: None)
    assert "pip install peft" in found["dora"].missing(CPU)
    monkeypatch.setattr(_kernel_place, "find_spec", lambda _: None)
    for name in (*KERNELS, "compiled_plain"):
        assert "pip install triton" in found[name].missing(GPU)


@pytest.mark.skipif(find_spec("triton") is None or torch.cuda.is_available(), reason="needs triton, and no GPU")
def test_triton_that_does_not_start_is_told() -> None:
    _kernel_place.no_driver.cache_clear()
    assert "Triton does not start here: 0 active drivers" in _kernel_place.no_kernels(GPU)


def kernels_run(mode: str, cache: Path, **environment: str) -> list[dict]:
    """tests/run_kernels.py, whose settings must not leak into this process."""
    paths = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "run_kernels.py"), mode]
    run = subprocess.run(command, env=os.environ | paths | environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    found = kernels_run("interpret", tmp_path, TRITON_INTERPRET="1")
    assert len(found) == 24
    for one in found:
        assert one["share"] <= 1 < one["without"], one
        assert one["shape"], one
        assert one["same"], one
        assert one["tried"] >= 3, one


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    found = kernels_run("compile", tmp_path)
    assert len(found) == 15
    for one in found:
        assert one["matrix"], one  # on the matrix units
        assert one["shared"] <= 227 << 10, one  # what one block may have there

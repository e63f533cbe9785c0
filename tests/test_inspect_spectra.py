"""Spectra, shares and sizes, against the singular values of the whole product in NumPy's float64."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_check.__main__ import main
from lora_check.inspection.cores import decompose, effective_rank, shares
from lora_check.inspection.leading import Weight, align, leading
from lora_check.inspection.modules import Place

OUT, IN, R, ALPHA = 23, 17, 5, 7
MODULE = "model.layers.0.mlp.up_proj"
PREFIX = "base_model.model."


def factors(seed: int, dtype: torch.dtype = torch.float32, r: int = R) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, r) and A (r, in) with a spectrum that falls."""
    make = torch.Generator().manual_seed(seed)
    fall = 0.4 ** torch.arange(r)
    b, a = torch.randn(OUT, r, generator=make) * fall, torch.randn(r, IN, generator=make)
    return b.to(dtype), a.to(dtype)


def exact(x: torch.Tensor) -> np.ndarray[Any, Any]:
    return x.to(torch.float64).numpy()


def product(b: torch.Tensor, a: torch.Tensor, s: float) -> np.ndarray[Any, Any]:
    return s * (exact(b) @ exact(a))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("s", [1.4, -0.3, 120.0])
def test_singular_values_are_those_of_the_whole_product(dtype: torch.dtype, s: float) -> None:
    b, a = factors(1, dtype)
    found, core = decompose(b, a, s)
    truth = np.linalg.svd(product(b, a, s), compute_uv=False)[:R]
    assert np.abs(np.array(found.values) - truth).max() <= found.error < 1e-9 * truth[0]
    assert np.abs(np.array(found.values) - 1.01 * truth).max() > found.error  # a scale that is off by 1 % is seen
    rebuilt = exact(core.left * core.values) @ exact(core.right).T * math.copysign(1, s)
    assert np.allclose(rebuilt, product(b, a, s), rtol=0, atol=found.error)
    assert found.norm == pytest.approx(np.linalg.norm(product(b, a, s)), rel=1e-12)
    assert found.stable_rank == pytest.approx((np.linalg.norm(truth) / truth[0]) ** 2, rel=1e-12)


def test_a_convolution_and_more_rank_than_room_are_cut_to_what_there_is() -> None:
    b, a = factors(2, r=20)
    found, _ = decompose(b, a, 1.0)
    assert len(found.values) == IN
    truth = np.linalg.svd(product(b, a, 1.0), compute_uv=False)
    assert np.abs(np.array(found.values) - truth).max() <= found.error


def test_energy_and_effective_rank_are_their_definitions() -> None:
    values = np.array([3.0, 2.0, 1.0])
    assert np.allclose(shares((values**2).tolist()), np.cumsum(values**2) / 14)
    p = values / values.sum()
    assert effective_rank(values.tolist()) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert effective_rank([2.0, 2.0, 2.0, 0.0]) == pytest.approx(3)
    assert shares([0.0, 0.0]) == () and effective_rank([0.0]) is None  # noqa: PT018


# ------------------------------------------------------------------------------------------------------------- rank


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_that_stands_twice_leaves_a_lower_rank(dtype: torch.dtype) -> None:
    b, a = factors(3, dtype)
    whole, _ = decompose(b, a, 2.0)
    assert whole.rank == R
    a[4] = a[1]
    assert decompose(b, a, 2.0)[0].rank == R - 1
    b[:, 3] = 0
    assert decompose(b, a, 2.0)[0].rank == R - 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_of_a_lower_rank_does_not_stand_out(dtype: torch.dtype) -> None:
    """A of rank 3, rounded to its storage: its rank is full, and two of its directions are nothing but rounding."""
    make = torch.Generator().manual_seed(4)
    low = torch.randn(R, 3, generator=make, dtype=torch.float64) @ torch.randn(3, IN, generator=make).double()
    b = torch.randn(OUT, R, generator=make, dtype=torch.float64)
    found, _ = decompose(b.to(dtype), low.to(dtype), 1.0)
    assert (found.rank, found.resolved) == (R, 3)
    full, _ = decompose(b.to(dtype), torch.randn(R, IN, generator=make).to(dtype), 1.0)
    assert (full.rank, full.resolved) == (R, R)


def test_the_noise_of_storage_is_a_bound() -> None:
    """Storing factors moves no singular value by more."""
    for seed in range(20):
        make = torch.Generator().manual_seed(seed)
        b, a = torch.randn(OUT, R, generator=make).double(), torch.randn(R, IN, generator=make).double()
        found, _ = decompose(b.to(torch.bfloat16), a.to(torch.bfloat16), 1.0)
        truth = np.linalg.svd(exact(b) @ exact(a), compute_uv=False)[:R]
        moved = np.abs(np.array(found.values) - truth).max()
        assert found.noise / 100 < moved <= found.noise


# ------------------------------------------------------------------------------------------------------ beside a base


@dataclass
class Held:
    """A checkpoint of one tensor."""

    tensor: torch.Tensor
    location: str = "memory"

    def read(self, name: str) -> torch.Tensor:
        assert name == "w"
        return self.tensor


def weight_of(spectrum: np.ndarray[Any, Any], seed: int = 5) -> torch.Tensor:
    """A matrix (out, in) of given singular values."""
    make = np.random.default_rng(seed)
    u, _ = np.linalg.qr(make.standard_normal((OUT, len(spectrum))))
    v, _ = np.linalg.qr(make.standard_normal((IN, len(spectrum))))
    return torch.from_numpy(u * spectrum @ v.T)


def truth_beside(w: np.ndarray[Any, Any], delta: np.ndarray[Any, Any], k: int) -> tuple[float, float, float, float]:
    """Relative size, the shares in W's k leading directions, and the amplification, from whole matrices."""
    u, _, vt = np.linalg.svd(w)
    norm = np.linalg.norm(delta)
    du, _, dvt = np.linalg.svd(delta)
    within = np.linalg.norm(du[:, :k].T @ w @ dvt[:k].T)
    left, right = np.linalg.norm(u[:, :k].T @ delta), np.linalg.norm(delta @ vt[:k].T)
    return norm / np.linalg.norm(w), (left / norm) ** 2, (right / norm) ** 2, norm / within


@pytest.mark.parametrize("turned", [False, True], ids=["out-in", "in-out"])
def test_an_update_beside_its_weight(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_check.inspection.leading.STRIP", 3 * IN)  # several strips
    w = weight_of(np.geomspace(9, 0.01, IN))
    b, a = factors(6)
    spectrum, core = decompose(b, a, 1.4)
    stored = torch.cat([torch.full((4, IN), 9.0).double(), w]) if not turned else w.T.contiguous()
    place = Place(tensor="w", rows=None if turned else (4, 4 + OUT), turned=turned)
    found = align(core, spectrum.rank, Weight(Held(stored), place))  # type: ignore[arg-type]
    assert found is not None
    wanted = truth_beside(exact(w), product(b, a, 1.4), R)
    assert (found.relative, found.left, found.right, found.amplification) == pytest.approx(wanted, rel=1e-5)
    assert found.chance == (R / OUT, R / IN)
    assert found.accuracy < 1e-5
    other = truth_beside(exact(weight_of(np.geomspace(9, 0.01, IN), seed=7)), product(b, a, 1.4), R)
    assert (found.left, found.right) != pytest.approx(other[1:3], rel=1e-2)


def test_the_accuracy_that_is_told_is_that_of_the_directions() -> None:
    """Leading directions of a flat spectrum cannot be told apart; then they are those of a matrix further from W."""
    make = torch.Generator().manual_seed(8)
    w = torch.randn(400, 300, generator=make, dtype=torch.float64)
    u, values, v, told = leading(Weight(Held(w), Place(tensor="w")), 4)  # type: ignore[arg-type]
    rest = exact(w) @ exact(v) - exact(u) * exact(values)
    assert told == pytest.approx(np.linalg.norm(rest, 2) / float(values[0]), rel=1e-6)
    assert told > 1e-3
    near = exact(w) - rest @ exact(v).T
    assert np.allclose(near @ exact(v), exact(u) * exact(values), atol=1e-10)
    assert np.allclose(near.T @ exact(u), exact(v) * exact(values), atol=1e-10)
    assert np.abs(exact(u).T @ exact(u) - np.eye(4)).max() < 1e-12


# ----------------------------------------------------------------------------------------------------- the whole line


def written(folder: Path, tensors: dict[str, torch.Tensor], file: str, config: dict[str, Any], name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / name).write_text(json.dumps(config))
    return str(folder)


def world(tmp_path: Path, *, rslora: bool = False) -> tuple[str, str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A base of two layers, an adapter with a pattern for one of its modules."""
    modules = {MODULE: factors(10), MODULE.replace("0", "1"): factors(11, r=3)}
    tensors = {
        f"{PREFIX}{name}.lora_{role}.weight": factor.contiguous()
        for name, pair in modules.items()
        for role, factor in zip("BA", pair, strict=True)
    }
    config = {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": ALPHA,
        "target_modules": ["up_proj"],
        "rank_pattern": {r"layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 11},
        "use_rslora": rslora,
        "init_lora_weights": True,
    }
    adapter = written(tmp_path / "adapter", tensors, "adapter_model.safetensors", config, "adapter_config.json")
    base = {f"{name}.weight": weight_of(np.geomspace(9, 0.1, IN), seed).float() for seed, name in enumerate(modules)}
    held = written(tmp_path / "base", base, "model.safetensors", {"model_type": "llama"}, "config.json")
    return adapter, held, modules


@pytest.mark.parametrize("rslora", [False, True])
def test_the_command_tells_the_spectra_of_every_module_and_family(
    rslora: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base, modules = world(tmp_path, rslora=rslora)
    assert main(["inspect", adapter, "--base", base, "--spectra", "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    deltas, weights = [], []
    for one, (name, (b, a)) in zip(told["modules"], modules.items(), strict=True):
        rank, alpha = (R, ALPHA) if "0" in name else (3, 11)
        s = alpha / math.sqrt(rank) if rslora else alpha / rank
        assert (one["name"], one["rank"], one["alpha"], one["scale"]) == (name, rank, alpha, pytest.approx(s))
        delta = product(b, a, s)
        truth = np.linalg.svd(delta, compute_uv=False)[:rank]
        assert one["spectrum"]["values"] == pytest.approx(truth.tolist(), rel=1e-9)
        assert one["spectrum"]["energy"] == pytest.approx((np.cumsum(truth**2) / (truth**2).sum()).tolist())
        w = exact(weight_of(np.geomspace(9, 0.1, IN), len(weights)).float())
        relative, left, right, amplified = truth_beside(w, delta, rank)
        beside = one["beside_base"]
        assert beside["relative"] == pytest.approx(relative, rel=1e-9)
        assert (beside["left"], beside["right"]) == pytest.approx((left, right), rel=1e-3)
        assert beside["amplification"] == pytest.approx(amplified, rel=1e-6)
        deltas.append(np.linalg.norm(delta))
        weights.append(np.linalg.norm(w))
    (family,) = told["families"]
    assert family["family"] == "up_proj"
    assert family["ranks"] == [5, 3]
    assert family["relative"] == pytest.approx(np.hypot(*deltas) / np.hypot(*weights), rel=1e-9)
    assert family["parameters"] == sum(factor.numel() for pair in modules.values() for factor in pair)


def test_the_drawing_is_svg_and_the_same_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, base, _ = world(tmp_path)
    for name in ("a.svg", "b.svg"):
        assert main(["inspect", adapter, "--base", base, "--plot", str(tmp_path / name)]) == 0
    drawing = (tmp_path / "a.svg").read_text()
    assert drawing == (tmp_path / "b.svg").read_text()
    assert "<svg" in drawing and "up_proj" in drawing and "|s B A| / |W|" in drawing  # noqa: PT018
    assert main(["inspect", adapter, "--plot", str(tmp_path / "c.svg")]) == 0
    assert (tmp_path / "c.svg").read_text() != drawing
    assert main(["inspect", base, "--plot", str(tmp_path / "d.svg")]) == 2
    assert "spectra are those of an adapter" in capsys.readouterr().err
    assert not (tmp_path / "d.svg").exists()

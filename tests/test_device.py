"""The way of a strip to a device and back: what it proves, and that whatever it does not is asked of the processor.

Where there is no GPU the same way is gone on the processor, without pinned memory and streams: 'cpu:0'.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_check import device, first_pass, pipeline, registry
from lora_check.errors import UsageError
from lora_check.first_pass import part
from lora_check.rounding import ADD, ROUNDED_DELTA
from lora_check.types import Case, LoadedStep, Scale

torch.set_num_threads(1)

PLACES = ["cpu:0", *(["cuda"] if torch.cuda.is_available() else [])]
ROWS, COLUMNS, R = 300, 130, 5


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device, and strips so small that both slots are used many times."""
    monkeypatch.setattr(device, "SLOT_ELEMENTS", 16 * COLUMNS)
    return str(request.param)


def made(dtype: torch.dtype, rounded: bool) -> tuple[Case, torch.Tensor]:
    """A case and its merge, by whole tensors."""
    random = torch.Generator().manual_seed(3)
    base = torch.randn(ROWS, COLUMNS, generator=random).mul(0.1).to(dtype)
    a, b = torch.randn(R, COLUMNS, generator=random) * 0.2, torch.randn(ROWS, R, generator=random) * 0.2
    scale = Scale(alpha=7, rank=R, default_alpha=7, default_rank=R)
    step = LoadedStep(recipe=registry.load("recipes")["lora-linear"], factors={"A": a, "B": b}, scale=scale)
    delta = (b @ a) * (7 / R)
    merged = base + delta.to(dtype) if rounded else (base.float() + delta).to(dtype)
    return Case(base=base, steps=(step,), storage=str(dtype).removeprefix("torch.")), merged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rounded", [False, True])
def test_a_device_sees_what_the_processor_sees(place: str, dtype: torch.dtype, rounded: bool) -> None:
    case, merged = made(dtype, rounded)
    how, rows = ROUNDED_DELTA if rounded else ADD, slice(7, ROWS - 5)
    here, there = part(case, merged, how, rows), part(case, merged, how, rows, place)
    assert here is not None
    assert there is not None
    assert (here.exact, here.unmoved) == (there.exact, there.unmoved) == (True, False)
    for name in ("signal", "cross", "noise"):  # sums of other strips
        assert getattr(here, name) == pytest.approx(getattr(there, name), rel=1e-4, abs=1e-9)
    other = merged.clone()
    other[151, 3] += 1
    assert part(case, other, how, rows) is part(case, other, how, rows, place) is None


def test_what_a_device_proves_is_asked_of_nobody_else(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, merged = made(torch.bfloat16, rounded=False)
    asked: list[slice] = []
    real = first_pass._Look._compared
    monkeypatch.setattr(
        first_pass._Look,
        "_compared",
        lambda self, base, stored, span: asked.append(span) or real(self, base, stored, span),
    )
    assert part(case, merged, ADD, slice(0, ROWS), place)
    if place != "cuda":  # whose products may differ in their last bits
        assert asked == []
    merged[40, 9] = torch.nextafter(merged[40, 9], torch.tensor(9.0, dtype=merged.dtype))
    part(case, merged, ADD, slice(0, ROWS), place)
    assert any(span.start <= 40 < span.stop for span in asked)
    assert len(asked) < 5 or place == "cuda"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_device_proves_nothing_that_is_not_finite(place: str, value: float) -> None:
    case, merged = made(torch.bfloat16, rounded=False)
    case.base[17, 5] = merged[17, 5] = value
    strips = [*device.agreed(first_pass.plain(case, ADD), case.base, merged, slice(0, ROWS), place)]
    assert [proved for span, _, _, proved in strips if span.start <= 17 < span.stop] == [False]
    assert part(case, merged, ADD, slice(0, ROWS), place) is None


def test_strips_are_every_row_once(place: str) -> None:
    case, merged = made(torch.float32, rounded=False)
    seen = [*device.agreed(first_pass.plain(case, ADD), case.base, merged, slice(5, 290), place)]
    assert [row for span, *_ in seen for row in range(span.start, span.stop)] == list(range(5, 290))
    for span, base, stored, _ in seen:
        assert torch.equal(base, case.base[span])
        assert torch.equal(stored, merged[span])


@pytest.mark.parametrize("name", ["llama-all-seven", "llama-rslora", "llama-dora", "llama-two-adapters"])
def test_the_verdicts_are_those_of_the_processor(world: Any, place: str, name: str) -> None:
    args = world(name, "bf16").args
    here, there = pipeline.check(*args), pipeline.check(*args, device=place)
    assert [(one.tensor, one.verdict) for one in here.comparisons] == [
        (one.tensor, one.verdict) for one in there.comparisons
    ]
    assert there.verdict.value == "verified"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing to refuse")
def test_a_device_that_is_not_here_is_refused_in_a_sentence(world: Any) -> None:
    with pytest.raises(UsageError, match=r"--device cuda: .* CUDA"):
        pipeline.check(*world("llama-qv", "bf16").args, device="cuda")

"""The gate of the latency benchmark: every honest order passes, everything else ends as wrong, with no time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from latency_subject import CPU, INPUTS, MERGED, UNMERGED, S, Unmerged, backend, site, subject, weight
from torch import Tensor, nn

from benchmarks.latency import budget, gate, plugins, watch
from benchmarks.latency.measure import measured
from benchmarks.latency.nouns import Backend, Place, Row, Site, Subject
from benchmarks.latency.place import place_of, settled
from lora_check.errors import UsageError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WALL = (plugins.load("clocks")["eager_wall"],)


def rows_of(found: Subject, *backends: Backend) -> dict[str, Row]:
    rows = measured(found, backends, WALL, CPU, rounds=1, budget=0.0)
    return {row.backend: row for row in rows if not row.again}


def share(one: Site, x: Tensor, y: Tensor) -> float:
    truth, allowed = budget.lora(one, x)
    return float(((y.double() - truth).abs() / allowed).max())


# ----------------------------------------------------------------------------------------------------- the budget


def numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_the_formula(dtype: torch.dtype, bias: bool) -> None:
    one, x = site(dtype, bias=bias), torch.randn(2, 3, INPUTS).to(dtype)
    w, a, b, wide = numpy(one.base.weight), numpy(one.a[0]), numpy(one.b[0]), numpy(x)
    expected = wide @ w.T + S * (wide @ a.T @ b.T) + (numpy(one.base.bias) if bias else 0)
    truth, allowed = budget.lora(one, x)
    np.testing.assert_allclose(numpy(truth), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(numpy(budget.alone(one, x)), expected - S * (wide @ a.T @ b.T), rtol=1e-12, atol=1e-12)
    assert allowed.shape == truth.shape
    assert bool((allowed > 0).all())


def test_each_sequence_has_its_own_adapter() -> None:
    one, x = site(torch.float32, chosen=(2, 0, 0)), torch.randn(3, 4, INPUTS)
    expected = [
        numpy(x[n]) @ (numpy(one.base.weight) + S * numpy(one.b[j]) @ numpy(one.a[j])).T
        for n, j in enumerate((2, 0, 0))
    ]
    truth, _ = budget.lora(one, x)
    np.testing.assert_allclose(numpy(truth), np.stack(expected), rtol=1e-11, atol=1e-11)
    flat, _ = budget.lora(one, x.reshape(12, INPUTS))
    assert torch.equal(flat, truth.reshape(12, -1))


def test_strips_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = site(torch.bfloat16, bias=True), torch.randn(5, INPUTS).bfloat16()
    whole = budget.lora(one, x)
    monkeypatch.setattr(budget, "STRIP", 7 * INPUTS)
    for parts, all_of in zip(budget.lora(one, x), whole, strict=True):
        torch.testing.assert_close(parts, all_of, rtol=1e-12, atol=1e-12)


Order = Callable[[Site, Tensor], Tensor]


def folded(one: Site, x: Tensor) -> Tensor:
    base = nn.functional.linear(x, one.base.weight, one.base.bias)
    return base + (x @ one.a[0].T) @ (one.s * one.b[0]).T


def scaled_first(one: Site, x: Tensor) -> Tensor:
    base = nn.functional.linear(x, one.base.weight, one.base.bias)
    return base + ((x @ one.a[0].T) * one.s) @ one.b[0].T


def detour(one: Site, x: Tensor) -> Tensor:
    base = nn.functional.linear(x, one.base.weight, one.base.bias)
    return (base + (x.float() @ one.a[0].float().T @ one.b[0].float().T) * one.s).to(x.dtype)


HONEST: dict[str, Order] = {
    "merged": lambda one, x: nn.functional.linear(x, weight(one), one.base.bias),
    "each step": lambda one, x: Unmerged(one)(x),
    "s on B": folded,
    "s on x A": scaled_first,
    "through float32": detour,
}


@pytest.mark.parametrize("order", HONEST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_honest_order_is_within_the_budget(dtype: torch.dtype, order: str) -> None:
    """Of one sign, and with sizes that differ a thousandfold, roundings add up as far as they can."""
    for seed in range(6):
        one = site(dtype, seed=seed, bias=bool(seed % 2))
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(4, INPUTS, generator=g)
        x = x * 10 ** (3 * torch.rand(x.shape, generator=g) - 2) if seed >= 4 else x.abs() if seed >= 2 else x
        assert 0 < share(one, x.to(dtype), HONEST[order](one, x.to(dtype))) <= 1


def test_two_ties_that_both_go_down_are_within_the_budget() -> None:
    """x W^T = 1 + 2^-8 is stored as 1, and so is 1 + s x A^T B^T: off by 2 u, all of what two stores may lose."""
    one = Site(base=nn.Linear(2, 1, bias=False), a=torch.tensor([[[0.0, 1.0]]]), b=torch.ones(1, 1, 1), s=1.0)
    one.base.requires_grad_(False).weight.fill_(1)
    one = replace(one, base=one.base.bfloat16(), a=one.a.bfloat16(), b=one.b.bfloat16())
    x = torch.tensor([[1.0, 2.0**-8]]).bfloat16()
    y = Unmerged(one)(x)
    assert y.item() == 1 == budget.lora(one, x)[0].item() - 2.0**-7
    assert 0.95 < share(one, x, y) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_budget_is_one_of_roundings_and_not_more(dtype: torch.dtype) -> None:
    """As many times the unit roundoff as numbers are summed, and a wrong s is far outside of it."""
    one, x = site(dtype), torch.randn(4, INPUTS).to(dtype)
    truth, allowed = budget.lora(one, x)
    size = x.double().abs() @ (one.base.weight.double().abs() + S * one.b[0].double().abs() @ one.a[0].double().abs()).T
    unit = torch.finfo(dtype).eps / 2
    assert bool((allowed < (8 * unit + 2 * INPUTS * 2.0**-24) * size).all())
    assert share(one, x, (truth + 0.5 * (truth - budget.alone(one, x))).to(dtype)) > 4


def test_a_row_of_zeros_has_a_budget_too() -> None:
    one, x = site(torch.bfloat16), torch.zeros(1, INPUTS, dtype=torch.bfloat16)
    assert share(one, x, torch.zeros(1, 40, dtype=torch.bfloat16)) == 0
    assert share(one, x, torch.full((1, 40), 1e-30, dtype=torch.bfloat16)) > 1


def test_no_reference_for_float64() -> None:
    with pytest.raises(UsageError, match="float64"):
        budget.lora(site(torch.float64), torch.randn(1, INPUTS, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------- the honest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(48, 40), (48, 40, 56)], ids=["one module", "two modules"])
def test_honest_backends_are_timed(dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    rows = rows_of(subject(dtype, widths=widths, bias=True), MERGED, UNMERGED)
    for row in rows.values():
        assert row.gate is not None
        assert row.gate.wrong == row.gate.replayed == ""
        assert 0 < row.gate.share <= 1
        assert len(row.clocks["eager_wall"].samples) >= 5
    assert rows["merged"].gate.bitwise  # type: ignore[union-attr]
    assert not rows["unmerged"].gate.bitwise  # type: ignore[union-attr]


def test_a_backend_may_have_a_reference_of_its_own() -> None:
    """Twice the adapter, as some other function: wrong by the common reference, right by its own."""

    class Twice(nn.Module):
        def __init__(self, one: Site) -> None:
            super().__init__()
            self.site = one

        def forward(self, x: Tensor) -> Tensor:
            return self.site.base(x) + 2 * S * (x @ self.site.a[0].T @ self.site.b[0].T)

    def doubled(one: Site, x: Tensor) -> tuple[Tensor, Tensor]:
        return budget.lora(Site(base=one.base, a=one.a, b=2 * one.b, s=one.s, chosen=one.chosen), x)

    rows = rows_of(subject(), MERGED, backend("own", Twice, reference=doubled), backend("common", Twice))
    assert rows["own"].gate.wrong == "" != rows["common"].gate.wrong  # type: ignore[union-attr]
    assert rows["own"].clocks
    assert not rows["common"].clocks


# ------------------------------------------------------------------------------------------------- the adversaries


class BaseAlone(Unmerged):
    def forward(self, x: Tensor) -> Tensor:
        return self.site.base(x)


class LastCall(Unmerged):
    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x) if self.last is None else self.last
        return self.last


class WrongScale(Unmerged):
    def forward(self, x: Tensor) -> Tensor:
        return self.site.base(x) + x @ self.site.a[0].T @ self.site.b[0].T


class Zeros(Unmerged):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(super().forward(x))


class NotANumber(Unmerged):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y[..., -1] = float("nan")
        return y


class ChangesInput(Unmerged):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.mul_(1.5)
        return y


class ChangesBase(Unmerged):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.site.base.weight.mul_(1.5)
        return y


class ChangesBaseInBuild(Unmerged):
    def __init__(self, one: Site) -> None:
        super().__init__(one)
        one.base.weight[0, 0] += 1


class InputItself(Unmerged):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape)


class Transposed(Unmerged):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :-1]


class OtherDtype(Unmerged):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


class OneToken(Unmerged):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y[..., -1, :] = self.site.base(x)[..., -1, :]
        return y


ADVERSARIES: dict[str, tuple[Callable[[Site], nn.Module], str]] = {
    "base alone": (BaseAlone, "times the budget"),
    "last call": (LastCall, "times the budget"),
    "wrong scale": (WrongScale, "times the budget"),
    "zeros": (Zeros, "times the budget"),
    "not a number": (NotANumber, "off by nan times"),
    "changes its input": (ChangesInput, "changes"),
    "changes the base": (ChangesBase, "changes the base"),
    "changes the base in build": (ChangesBaseInBuild, "changes the base"),
    "its input": (InputItself, "memory of the input"),
    "another shape": (Transposed, "the output is"),
    "another dtype": (OtherDtype, "torch.float64"),
    "one token": (OneToken, "times the budget"),
}


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("widths", [(48, 48), (48, 48, 48)], ids=["one module", "two modules"])
def test_an_adversary_gets_no_time(name: str, widths: tuple[int, ...]) -> None:
    build, says = ADVERSARIES[name]
    found = subject(widths=widths)
    before = [one.base.weight.clone() for sites in found.sites for one in sites.values()]
    rows = rows_of(found, backend(name, build), MERGED, UNMERGED)
    row = rows[name]
    assert row.gate is not None
    assert says in row.gate.wrong
    assert not row.gate.bitwise
    assert not row.clocks
    assert not row.missing
    for honest in (rows["merged"], rows["unmerged"]):
        assert honest.gate is not None
        assert honest.gate.wrong == "", "an adversary must leave nothing behind"
        assert honest.clocks["eager_wall"].samples
    after = [one.base.weight for sites in found.sites for one in sites.values()]
    assert all(map(torch.equal, before, after))


def test_what_is_changed_behind_a_module_is_found() -> None:
    """The second module changes what it gets from the first, or the inputs of the whole, which it does not get."""
    found = subject(widths=(48, 40, 56))
    (x,) = found.inputs[0]
    assert isinstance(x, Tensor)

    class ChangesAll(Unmerged):
        def forward(self, given: Tensor) -> Tensor:
            y = super().forward(given)
            x.mul_(1.5)
            return y

    for changes, says in ((ChangesInput, "inner.layer1: it changes its input"), (ChangesAll, "inputs of the forward")):

        def build(one: Site, changes: type[Unmerged] = changes) -> nn.Module:
            return (changes if one.base.in_features == 40 else Unmerged)(one)

        row = rows_of(found, MERGED, backend("changes", build))["changes"]
        assert row.gate is not None
        assert says in row.gate.wrong


def test_inputs_that_differ_are_weighed_together_each_with_its_adapters() -> None:
    one = site(torch.float32, chosen=(1, 0, 0))
    inputs = [torch.randn(3, 2, INPUTS) for _ in range(2)]
    looks = [
        watch.Look(where="it", wrong="", x=x, y=budget.lora(one, x)[0].float(), kept=torch.tensor(True))
        for x in (*inputs, inputs[0])
    ]
    watch.weigh(one, budget.lora, looks)
    assert all(0 < look.share <= 1 and look.visible > watch.VISIBLE for look in looks)
    assert looks[0].share == looks[2].share != looks[1].share


def test_what_was_built_before_a_build_failed_takes_no_memory() -> None:
    built: list[Site] = []

    def build(one: Site) -> nn.Module:
        built.append(one)
        if len(built) == 2:
            raise NotImplementedError
        return Unmerged(one)

    trial = gate.build(subject(copies=2), backend("half", build), CPU)
    assert (trial.modules, trial.missing) == ((), "NotImplementedError")


def test_a_wrong_copy_is_found() -> None:
    """Right in the first copy and wrong in the second: calls go round all of them."""
    built: list[nn.Module] = []

    def build(one: Site) -> nn.Module:
        built.append((Unmerged, BaseAlone)[len(built)](one))
        return built[-1]

    row = rows_of(subject(copies=2), MERGED, backend("second", build))["second"]
    assert row.gate is not None
    assert "times the budget" in row.gate.wrong


def test_a_module_that_is_not_called_is_not_right() -> None:
    found = subject(widths=(48, 40, 56))
    for copy in found.copies:
        copy.forward = lambda x, copy=copy: copy.inner["layer0"](x)  # type: ignore[method-assign]
    row = rows_of(found, MERGED)["merged"]
    assert row.gate is not None
    assert row.gate.wrong == "inner.layer1: it was not called"


def test_the_modules_of_a_model_are_looked_at_from_the_first_token_to_the_last() -> None:
    x = torch.arange(2 * 130 * 3).reshape(2, 130, 3)
    kept = watch.some(x, 64)
    assert kept.shape == (2, 64, 3)
    assert torch.equal(kept[:, [0, -1]], x[:, [0, -1]])
    assert len(kept[0, :, 0].unique()) == 64
    assert torch.equal(watch.some(x, 0), x)
    assert torch.equal(watch.some(x[0, 0], 64), x[0, 0])
    rows = rows_of(subject(widths=(48, 40, 56), shape=(1, 130)), MERGED, backend("one token", OneToken))
    assert rows["one token"].gate.wrong  # type: ignore[union-attr]
    assert not rows["merged"].gate.wrong  # type: ignore[union-attr]


def test_an_output_that_changes_after_the_call_is_found() -> None:
    """What work on another stream looks like from here."""
    at_once = torch.zeros(3)
    assert list(gate.unsteady(at_once.clone(), at_once)) == []
    assert "another stream" in next(gate.unsteady(torch.ones(3), at_once))
    assert "not finite" in next(gate.unsteady(torch.full((3,), torch.inf), torch.full((3,), torch.inf)))


# ------------------------------------------------------------------------------------------------------ blindness


def test_a_weak_adapter_is_refused() -> None:
    """In bfloat16 an adapter of a thousandth could be left out unseen: nobody is timed, nobody is called right."""
    rows = rows_of(subject(torch.bfloat16, strength=1e-3), MERGED, UNMERGED, backend("alone", BaseAlone))
    for row in rows.values():
        assert "could not see" in row.missing
        assert "inner.layer0" in row.missing
        assert row.gate is None
        assert not row.clocks


def test_garbage_of_an_adversary_does_not_blind_the_gate() -> None:
    """The second module gets zeros from the first, with which no adapter moves anything: the first is to blame."""
    rows = rows_of(subject(widths=(48, 40, 56)), backend("zeros", Zeros), MERGED)
    assert rows["zeros"].gate.wrong.startswith("inner.layer0")  # type: ignore[union-attr]
    assert rows["merged"].clocks


# ------------------------------------------------------------------------------------------------------- on a GPU


class Beside(Unmerged):
    """Computes on a stream of its own, and nobody waits for it; `waits`: it waits for the others, at least."""

    waits = False

    def __init__(self, one: Site) -> None:
        super().__init__(one)
        self.stream = torch.cuda.Stream()

    def forward(self, x: Tensor) -> Tensor:
        if self.waits:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            return super().forward(x)


class BesideAndWaits(Beside):
    waits = True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams exist on a GPU only, and there is none here")
def test_work_on_another_stream_gets_no_time() -> None:
    place: Place = place_of("cuda")
    found = subject(torch.bfloat16, widths=(1024, 1024), shape=(64, 16), device="cuda", copies=2)
    rivals = (MERGED, UNMERGED, backend("beside", Beside), backend("waits", BesideAndWaits))
    clocks = tuple(plugins.load("clocks").values())
    rows = {row.backend: row for row in measured(found, rivals, clocks, place, rounds=5) if not row.again}
    for name in ("merged", "unmerged"):
        assert rows[name].gate.replayed == "same"  # type: ignore[union-attr]
        assert all(timing.samples for timing in rows[name].clocks.values())
    assert rows["merged"].kernels == 1
    assert rows["beside"].gate.wrong  # type: ignore[union-attr]
    assert rows["waits"].gate.wrong or not rows["waits"].clocks["graph_replay"].samples  # type: ignore[union-attr]


def test_flags_of_precision_are_put_back() -> None:
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction, torch.get_float32_matmul_precision()
    try:
        flags.allow_bf16_reduced_precision_reduction = True
        torch.set_float32_matmul_precision("high")
        with settled(CPU):
            assert not flags.allow_bf16_reduced_precision_reduction
            assert torch.get_float32_matmul_precision() == "highest"
            assert torch.is_inference_mode_enabled()
        with pytest.raises(KeyError), settled(CPU):
            raise KeyError
        assert flags.allow_bf16_reduced_precision_reduction
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.is_inference_mode_enabled()
    finally:
        flags.allow_bf16_reduced_precision_reduction = before[0]
        torch.set_float32_matmul_precision(before[1])

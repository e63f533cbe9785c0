"""The rounds of the latency benchmark: order, A/A, restoration, what is missing, clocks, the place, plug-ins."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from latency_subject import CPU, MERGED, UNMERGED, Merged, Unmerged, backend, subject
from torch import Tensor, nn

from benchmarks.latency import gate, measure, plugins
from benchmarks.latency.clocks import _rounds
from benchmarks.latency.measure import LEAST_ROUNDS, measured, merge, shuffled
from benchmarks.latency.nouns import Clock, Place, Row, Site, Subject, Timed
from benchmarks.latency.place import UNKNOWN_CACHE, peak, place_of, private_cache
from lora_check.errors import RegistryError, UsageError

CLOCKS = plugins.load("clocks")
OTHERS = tuple(backend(f"rival {n}", Unmerged) for n in range(3))


def ticking(log: list[str], **kwargs: object) -> Clock:
    """A clock that writes down whom it measures; each sample is the number of those before it."""

    def prepare(timed: Timed, place: Place) -> Callable[[], float]:
        def once() -> float:
            log.append(timed.name)
            return float(len(log))

        return once

    return Clock(name="ticks", about="", place=1, prepare=prepare, **kwargs)  # type: ignore[arg-type]


def by_name(rows: tuple[Row, ...]) -> dict[tuple[str, bool], Row]:
    return {(row.backend, row.again): row for row in rows}


# ------------------------------------------------------------------------------------------------------ the rounds


def test_each_round_has_an_order_of_its_own_and_merged_is_measured_twice() -> None:
    log: list[str] = []
    rows = measured(subject(), (MERGED, *OTHERS), (ticking(log),), CPU, rounds=7, budget=60.0)
    rounds = [log[start : start + 5] for start in range(0, len(log), 5)]
    assert len(rounds) == 7
    assert sorted(rounds[0]) == ["merged", "merged", "rival 0", "rival 1", "rival 2"]
    assert all(sorted(names) == sorted(rounds[0]) for names in rounds)
    before = {pair for names in rounds for pair in pairwise(names)}
    assert len(before) > 2 * 4, "to rotate an order would keep its neighbours"
    assert [(row.backend, row.again) for row in rows[:3]] == [("merged", False), ("merged", True), ("rival 0", False)]
    assert len(rows) == 5
    samples = {key: row.clocks["ticks"].samples for key, row in by_name(rows).items()}
    assert sorted(number for each in samples.values() for number in each) == list(range(1, 36))
    for number in range(7):
        assert {int(each[number] - 1) // 5 for each in samples.values()} == {number}, "samples pair by their round"


@pytest.mark.parametrize(("rounds", "budget", "expected"), [(9, 0.0, 6), (2, 60.0, 6), (7, 60.0, 7)])
def test_rounds_end_with_the_seconds_but_not_before_the_sixth(rounds: int, budget: float, expected: int) -> None:
    rows = measured(subject(), (MERGED, UNMERGED), (ticking([]),), CPU, rounds=rounds, budget=budget)
    assert {len(row.clocks["ticks"].samples) for row in rows} == {expected}
    assert LEAST_ROUNDS == 6


def test_an_order_is_a_permutation_and_the_same_in_every_run() -> None:
    orders = [shuffled(range(9), number) for number in range(20)]
    assert orders == [shuffled(range(9), number) for number in range(20)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    followers = {one: {order[at + 1] for order in orders if (at := order.index(one)) < 8} for one in range(9)}
    assert all(len(those) > 5 for those in followers.values())
    assert shuffled([], 4) == []


def test_a_round_that_no_clock_sees_comes_before_each_sample() -> None:
    found, order = subject(), list[str]()

    def prepare(timed: Timed, place: Place) -> Callable[[], float]:
        def once() -> float:
            order.append("sample")
            return 1.0

        return once

    def call(module: nn.Module, inputs: tuple[object, ...]) -> Tensor:
        order.append("call")
        return found.call(module, inputs)

    clock = Clock(name="looks", about="", place=1, prepare=prepare)
    measured(replace(found, call=call), (MERGED,), (clock,), CPU, rounds=6, budget=0.0)
    assert order.count("sample") == 12
    assert all(
        order[at - len(found.copies) : at] == ["call"] * len(found.copies)
        for at, one in enumerate(order)
        if one == "sample"
    )


# ------------------------------------------------------------------------------------- what stands in place, and when


def test_modules_stand_in_only_while_they_are_called_or_timed() -> None:
    found, seen = subject(widths=(48, 40, 56)), list[list[type]]()

    def prepare(timed: Timed, place: Place) -> Callable[[], float]:
        assert len(timed.calls) == len(found.copies)

        def once() -> float:
            seen.append([type(copy.get_submodule(path)) for copy in found.copies for path in found.targets])
            return timed.calls[0]().abs().sum().item()

        return once

    clock = Clock(name="looks", about="", place=1, prepare=prepare)
    rows = measured(found, (MERGED, UNMERGED), (clock,), CPU, rounds=1, budget=0.0)
    assert {tuple(types) for types in seen} == {(Merged,) * 4, (Unmerged,) * 4}
    for copy, sites in zip(found.copies, found.sites, strict=True):
        assert all(copy.get_submodule(path) is one.base for path, one in sites.items())
    assert all(row.clocks["looks"].samples[0] > 0 for row in rows)


def test_the_bases_are_back_whatever_happens() -> None:
    found = subject(widths=(48, 40, 56))
    trial = gate.build(found, UNMERGED, CPU)
    path, one = next(iter(found.sites[1].items()))
    with gate.installed(found, trial.modules):
        assert found.copies[1].get_submodule(path) is trial.modules[1][path]
    assert found.copies[1].get_submodule(path) is one.base
    with pytest.raises(KeyboardInterrupt), gate.installed(found, trial.modules):
        raise KeyboardInterrupt
    assert found.copies[1].get_submodule(path) is one.base
    with (
        pytest.raises(AttributeError),
        gate.installed(found, [{path: nn.Identity(), "inner.none.layer": nn.Identity()}]),
    ):
        pass
    assert found.copies[0].get_submodule(path) is found.sites[0][path].base


# --------------------------------------------------------------------------------------------------- what is missing


class Raises(Unmerged):
    """Fails in the call of that number."""

    after = 0

    def __init__(self, one: Site) -> None:
        super().__init__(one)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.after:
            raise torch.OutOfMemoryError("tried to allocate\n 80 GiB")
        return super().forward(x)


class RaisesLater(Raises):
    after = 3


def unbuildable(one: Site) -> nn.Module:
    raise NotImplementedError


def test_what_cannot_run_is_a_row_with_the_reason() -> None:
    found = subject()
    rivals = (
        backend("absent", Unmerged, missing=lambda place: f"no such kernel on a {place.kind}"),
        backend("unbuildable", unbuildable),
        backend("raises", Raises),
        MERGED,
    )
    rows = by_name(measured(found, rivals, (CLOCKS["eager_wall"],), CPU, rounds=1, budget=0.0))
    assert list(rows) == [(one.name, False) for one in rivals] + [("merged", True)]
    assert rows["absent", False].missing == "no such kernel on a cpu"
    assert rows["unbuildable", False].missing == "NotImplementedError"
    assert rows["raises", False].missing == "out of memory: tried to allocate 80 GiB"
    for name in ("absent", "unbuildable", "raises"):
        assert rows[name, False].gate is None
        assert not rows[name, False].clocks
    assert rows["merged", False].clocks["eager_wall"].samples
    assert all(
        copy.get_submodule(path) is one.base
        for copy, sites in zip(found.copies, found.sites, strict=True)
        for path, one in sites.items()
    )


def test_a_backend_that_fails_when_it_is_timed_has_no_samples_and_the_others_have() -> None:
    """A backend that passes the gate and fails when it is timed; and an A/A says why the merged one cannot run."""
    log: list[str] = []
    rivals = (MERGED, backend("later", RaisesLater))
    rows = by_name(measured(subject(), rivals, (CLOCKS["eager_wall"], ticking(log)), CPU, rounds=1, budget=0.0))
    later = rows["later", False]
    assert not later.missing
    assert later.clocks["eager_wall"].samples == ()
    assert later.clocks["eager_wall"].missing.startswith("out of memory")
    assert later.clocks["ticks"].missing.startswith("out of memory"), "what cannot run has no time by any clock"
    assert len(rows["merged", True].clocks["ticks"].samples) == LEAST_ROUNDS
    rows = by_name(measured(subject(), (replace(MERGED, build=unbuildable),), (ticking(log),), CPU))
    assert rows["merged", True].missing == rows["merged", False].missing == "NotImplementedError"


def test_a_clock_that_fails_in_the_middle_keeps_no_half_of_its_samples() -> None:
    def prepare(timed: Timed, place: Place) -> Callable[[], float]:
        left = iter([1.0, 2.0])
        return lambda: next(left) if timed.name == "unmerged" else 1.0

    clock = Clock(name="short", about="", place=1, prepare=prepare)
    rows = by_name(measured(subject(), (MERGED, UNMERGED), (clock,), CPU, rounds=1, budget=0.0))
    assert rows["unmerged", False].clocks["short"].samples == ()
    assert rows["unmerged", False].clocks["short"].missing == "StopIteration"
    assert rows["merged", True].clocks["short"].samples == (1.0,) * LEAST_ROUNDS


def test_an_error_of_the_harness_is_not_taken_for_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(gate, "weighed", broken)
    with pytest.raises(ZeroDivisionError):
        measured(subject(), (MERGED,), (ticking([]),), CPU)


# --------------------------------------------------------------------------------------------------------- the clocks


def timed(*calls: Callable[[], Tensor]) -> Timed:
    return Timed(name="timed", calls=calls)


def asleep() -> Tensor:
    time.sleep(0.01)
    return torch.zeros(1)


def at_work() -> Tensor:
    until = time.thread_time() + 0.01
    while time.thread_time() < until:
        pass
    return torch.zeros(1)


def test_the_wall_counts_what_the_processor_does_not() -> None:
    sleeping = {name: CLOCKS[name].prepare(timed(asleep, asleep), CPU)() for name in ("eager_wall", "device_busy")}
    assert sleeping["eager_wall"] >= 0.01
    assert sleeping["device_busy"] < 0.005
    assert CLOCKS["eager_wall"].prepare(timed(asleep, *7 * [lambda: torch.zeros(1)]), CPU)() < 0.01, "the mean"
    working = {name: CLOCKS[name].prepare(timed(at_work, asleep), CPU)() for name in ("eager_wall", "device_busy")}
    assert working["eager_wall"] >= 0.01
    assert 0.005 <= working["device_busy"] < 0.01, "the mean over the copies"


def test_a_sample_of_short_calls_is_many_rounds_round_the_copies() -> None:
    log: list[int] = []
    calls = [lambda n=n: (log.append(n), torch.zeros(1))[1] for n in range(3)]
    once = CLOCKS["eager_wall"].prepare(timed(*calls), CPU)
    del log[:]
    assert 0 < once() < _rounds.LEAST / 3
    assert len(log) > 3
    assert log == [0, 1, 2] * (len(log) // 3)


def test_long_calls_are_warmed_up_once() -> None:
    log: list[None] = []
    CLOCKS["eager_wall"].prepare(timed(lambda: (log.append(None), asleep())[1]), CPU)
    assert len(log) == 1


def test_durations_are_those_of_the_profiler() -> None:
    """What the GPU's clock reads, on the only device that is here."""
    from benchmarks.latency.clocks.device_busy import durations

    left, right = torch.randn(300, 300), torch.randn(300, 300)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        began = time.perf_counter()
        left @ right
        lasted = time.perf_counter() - began
        with torch.profiler.record_function("an annotation of the user"):
            pass
    found = durations(profile, torch.autograd.DeviceType.CPU)
    told = [event.time_range.elapsed_us() * 1e-6 for event in profile.events() if not event.is_user_annotation]
    assert sorted(found) == pytest.approx(sorted(told), rel=1e-6, abs=2e-9)
    assert 0 < max(found) <= lasted
    assert durations(profile, torch.autograd.DeviceType.CUDA) == []


def test_graph_replay_says_why_a_cpu_has_none() -> None:
    clock = CLOCKS["graph_replay"]
    rows = measured(subject(), (MERGED,), (clock,), CPU)
    assert rows[0].clocks["graph_replay"].missing == clock.missing(CPU) == "a CPU has no graphs to replay"
    assert clock.missing(Place(device="cuda:1", cache=1)) == ""
    assert list(CLOCKS) == ["device_busy", "graph_replay", "eager_wall"]


def test_kernels_come_from_the_clock_that_counts_them() -> None:
    class Counts:
        kernels: int | None = None

        def __call__(self) -> float:
            self.kernels = 4
            return 1.0

    clock = Clock(name="counts", about="", place=1, prepare=lambda *_: Counts())
    assert [row.kernels for row in measured(subject(), (MERGED,), (clock,), CPU)] == [4, 4]
    assert [row.kernels for row in measured(subject(), (MERGED,), (ticking([]),), CPU)] == [None, None]


def test_a_backend_that_is_wrong_under_a_graph_has_no_time_there_alone() -> None:
    trial = gate.Trial(backend=MERGED, fixed="wrong under graph replay")
    trial.modules = gate.build(found := subject(), MERGED, CPU).modules
    runner, log = measure.Runner(trial=trial), list[str]()
    runner.prepare(found, (replace(ticking(log), name="graph_replay"), ticking(log)), CPU)
    runner.measure(found, keep=True)
    row = runner.row(None)
    assert row.clocks["graph_replay"].missing == "wrong under graph replay"
    assert len(row.clocks["ticks"].samples) == 1


# ----------------------------------------------------------------------------------------------------- memory, merge


def test_held_is_what_a_backend_keeps_for_one_copy() -> None:
    found: Subject = subject(copies=3)
    one = found.sites[0]["inner.layer0"]
    weights, factors = 4 * 48 * 40, 4 * 5 * (48 + 40)
    assert measure.held(gate.build(found, MERGED, CPU), found) == weights
    assert measure.held(gate.build(found, UNMERGED, CPU), found) == weights
    beside = gate.build(found, UNMERGED, CPU)
    beside.modules[0]["inner.layer0"].plain = one.a
    beside.modules[0]["inner.layer0"].register_buffer("b", one.b)
    assert measure.held(beside, found) == weights + factors
    assert peak(CPU, lambda: None) is None
    assert {row.memory for row in measured(found, (MERGED, UNMERGED), (ticking([]),), CPU)} == {None}


def test_a_merge_is_timed_on_copies_and_adds_the_delta() -> None:
    found = subject(torch.bfloat16, widths=(48, 40, 56))
    before = [one.base.weight.clone() for sites in found.sites for one in sites.values()]
    timing = merge(found, CLOCKS["eager_wall"], CPU, rounds=6, budget=60.0)
    assert len(timing.samples) == 6
    assert min(timing.samples) > 0
    assert all(map(torch.equal, before, (one.base.weight for sites in found.sites for one in sites.values())))
    weights = {path: one.base.weight.clone() for path, one in found.sites[0].items()}
    with torch.inference_mode():
        measure.merged(weights, found.sites[0])
    for path, one in found.sites[0].items():
        wide = one.base.weight.double() + one.s * one.b[0].double() @ one.a[0].double()
        torch.testing.assert_close(weights[path].double(), wide, rtol=2.0**-8, atol=1e-6)
        assert not torch.equal(weights[path], one.base.weight)
    missing = replace(CLOCKS["eager_wall"], missing=lambda _: "no clock")
    assert merge(found, missing, CPU).missing == "no clock"


# ----------------------------------------------------------------------------------------------------------- the place


def test_the_cache_of_a_core_is_read_from_the_system(tmp_path: Path) -> None:
    assert private_cache(tmp_path) == UNKNOWN_CACHE
    for index, (level, size) in enumerate([("1", "48K"), ("2", "1280K"), ("3", "32M")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{size}\n")
    assert private_cache(tmp_path) == 1280 << 10
    assert place_of("cpu") == Place(device="cpu", cache=private_cache())


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta"])
def test_a_device_that_is_not_there_is_one_sentence(device: str) -> None:
    with pytest.raises(UsageError, match=device) as raised:
        place_of(device)
    assert "\n" not in raised.value.message
    assert "cpu" in raised.value.hint


# ------------------------------------------------------------------------------------------------------------ plug-ins


Package = Callable[[Mapping[str, str]], str]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """(file -> source) -> a new package whose folder `clocks` holds them."""
    name = f"latency_plugins_{tmp_path.name.replace('-', '_')}"

    def make(files: Mapping[str, str]) -> str:
        folder = tmp_path / name / "clocks"
        folder.mkdir(parents=True)
        for where in (folder, folder.parent):
            (where / "__init__.py").write_text("")
        for file, source in files.items():
            (folder / file).write_text(source)
        return name

    monkeypatch.syspath_prepend(tmp_path)
    yield make
    for loaded in [one for one in sys.modules if one.startswith(name)]:
        del sys.modules[loaded]


def plugin(name: str, place: int) -> str:
    return f"from types import SimpleNamespace\nCLOCK = SimpleNamespace(name={name!r}, place={place})\n"


def test_plugins_come_in_the_order_of_their_places(package: Package) -> None:
    name = package({"a.py": plugin("x", 2), "b.py": plugin("y", 1), "_c.py": "raise SystemExit"})
    found = plugins.load("clocks", name)
    assert list(found) == ["y", "x"]
    with pytest.raises(TypeError):
        found["z"] = None  # type: ignore[index]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a.py": plugin("x", 1), "b.py": plugin("x", 2)}, r"clocks\.b and .*clocks\.a both register 'x'"),
        ({"a.py": "BACKEND = 1\n"}, r"clocks\.a has no CLOCK"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(package: Package, files: dict[str, str], says: str) -> None:
    with pytest.raises(RegistryError, match=says):
        plugins.load("clocks", package(files))


@pytest.mark.parametrize("folder", plugins.CONSTANTS)
def test_every_file_of_a_folder_is_one_plugin(folder: str) -> None:
    files = [path for path in (Path(plugins.__file__).parent / folder).glob("*.py") if not path.name.startswith("_")]
    found = plugins.load(folder)
    assert len(files) == len(found) > 0
    assert all(key == entry.name for key, entry in found.items())
    assert [entry.place for entry in found.values()] == sorted(entry.place for entry in found.values())

"""Work in other processes: one report whoever does it, nothing lost when a worker ends, no other files or versions."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import dask
import many
import pytest
import torch
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from test_corpus import CORPUS, made

from lora_check import distributed, pipeline, registry
from lora_check.engines import _elsewhere as elsewhere
from lora_check.engines import dask as engine
from lora_check.errors import InputError, LoraCheckError, NotFoundError, UsageError
from lora_check.inputs import opened_inputs
from lora_check.items import Request, item
from lora_check.means import Means
from lora_check.plan import make_plan
from lora_check.types import Engine
from lora_check.work import Job, job

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
LAYERS = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[str]]:
    """Whether it is broken -> the locations of a merge."""
    root = tmp_path_factory.mktemp("many")
    return {broken: many.make(root / str(broken), LAYERS, broken=broken) for broken in (False, True)}


@pytest.fixture(scope="module")
def here(models: dict[bool, list[str]]) -> dict[bool, Any]:
    """The report of each by threads of this process."""
    return {broken: report(places, "local") for broken, places in models.items()}


def report(places: Sequence[str], name: str, **options: Any) -> Any:
    base, adapter, merged = places
    return many.plain(pipeline.check(base, adapter, merged, engine=name, jobs=2, **options).as_dict())


def test_the_two_merges_are_what_they_are_meant_to_be(here):
    assert here[False]["verdict"] == "verified"
    assert here[True]["verdict"] == "refuted"
    assert {"LC102", "LC101"} <= {one["code"] for one in here[True]["findings"]}


# ------------------------------------------------------------------------------------------- what goes over a wire


def posted(work: Any, items: Sequence[Any], jobs: int, done: Any) -> list[Any]:
    """Everything pickled on its way there and back."""
    results = []
    for one in items:
        there, asked = pickle.loads(pickle.dumps((work, one)))
        result = there(asked)
        back = pickle.loads(pickle.dumps(result))
        assert type(back) is type(result)
        assert repr(back) == repr(result)
        results.append(back)
        done(one, back)
    return results


POSTED = Engine(name="posted", run=posted, remote=True)

MISTAKES = (
    "LC102/*",
    "LC109/*",
    "LC124/*",
    "LC126/*",
    "LC140/*",
    "LC146/*",
    "LC155/*",
    "LC404/*",
    "LC413/*",
)


@pytest.fixture
def with_post(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more engine."""
    known = registry.load
    monkeypatch.setattr(registry, "load", lambda folder: {**known(folder), **_more(folder)})


def _more(folder: str) -> dict[str, Any]:
    return {"posted": POSTED} if folder == "engines" else {}


@pytest.mark.parametrize("pattern", MISTAKES)
def test_items_and_answers_survive_the_post_and_say_the_same(pattern, tmp_path, with_post):
    case = sorted(CORPUS.glob(pattern))[0]
    base, *adapters, merged = made(case, tmp_path)
    told = [pipeline.check(base, adapters, merged, engine=name, jobs=1).as_dict() for name in ("local", "posted")]
    assert many.plain(told[0]) == many.plain(told[1])
    assert told[0]["findings"]
    assert told[0]["verdict"] == "refuted"


def test_what_cannot_be_sent_would_be_seen(models, with_post):
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        posted(lambda one: one, [1], 1, print)


# ---------------------------------------------------------------------------------------------- the same check only


@contextmanager
def opened(places: Sequence[str]) -> Iterator[tuple[Request, Job]]:
    base, adapter, merged = places
    with opened_inputs(base, (adapter,), merged) as found:
        yield Request(base=base, adapters=(adapter,), merged=merged), job(*found, make_plan(*found))


@pytest.fixture
def errand(tmp_path: Path) -> tuple[distributed.Errand, Any, Path]:
    """An errand, an item of it, and the folder that it is about."""
    with opened(many.make(tmp_path, 2)) as (request, found):
        return distributed.errand(request, found), item(found.plan, 1), tmp_path


def test_a_worker_does_what_the_job_here_does(errand, tmp_path):
    asked, one, _ = errand
    with opened([str(tmp_path / name) for name in ("base", "adapter", "merged")]) as (_, found):
        assert distributed.perform(asked, one) == found.perform(one)


def test_a_worker_that_cannot_see_the_files_says_so(errand):
    asked, one, folder = errand
    (folder / "merged").rename(folder / "elsewhere")
    with pytest.raises(NotFoundError, match=r"a worker on .*merged") as told:
        distributed.perform(asked, one)
    assert told.value.hint == distributed.SAME_FILES


@pytest.mark.parametrize("deed", ["newer", "config", "alpha"])
def test_a_worker_that_sees_other_files_is_not_listened_to(errand, deed):
    asked, one, folder = errand
    weights = folder / "merged" / "model.safetensors"
    if deed == "newer":
        os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    elif deed == "config":
        (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
    else:
        told = folder / "adapter" / "adapter_config.json"
        told.write_text(told.read_text().replace('"lora_alpha": 7', '"lora_alpha": 9'))
    with pytest.raises(InputError, match=r"a worker on .*: other files lie at these locations"):
        distributed.perform(asked, one)


def test_a_worker_may_see_a_copy_that_kept_its_times(errand):
    asked, one, folder = errand
    expected = distributed.perform(asked, one)
    distributed._held.cache_clear()
    weights = folder / "merged" / "model.safetensors"
    times, data = weights.stat(), weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert distributed.perform(asked, one) == expected


@pytest.mark.parametrize("name", ["torch", "lora_check", "code"])
def test_a_worker_of_another_version_is_refused(errand, name):
    asked, one, _ = errand
    other = replace(asked, programs=tuple((key, "0.0" if key == name else told) for key, told in asked.programs))
    with pytest.raises(UsageError, match=f"a worker on .* has {name} .*, not 0.0") as told:
        distributed.perform(other, one)
    assert "the same versions everywhere" in told.value.hint


def test_changed_files_are_opened_anew_by_a_worker_that_stays(errand, tmp_path):
    asked, one, folder = errand
    before = distributed.perform(asked, one)
    (folder / "merged" / "model.safetensors").unlink()
    many.make(tmp_path / "other", 2, broken=True)
    (tmp_path / "other" / "merged" / "model.safetensors").rename(folder / "merged" / "model.safetensors")
    with opened([str(folder / name) for name in ("base", "adapter", "merged")]) as (request, found):
        asked = distributed.errand(request, found)
        places = range(len(found.plan.pairings))
        assert any(distributed.perform(asked, item(found.plan, place)).refuted for place in places)
    assert before.refuted is None


# -------------------------------------------------------------------------------------------------- few in flight


class Threads:
    """A crowd in this process, whose workers end as they are told to: a batch -> how often it is lost."""

    def __init__(self, lost: Callable[[Sequence[int]], bool]) -> None:
        self.lost, self.most, self.flying, self.alone = lost, 0, 0, []

    def workers(self) -> int:
        return 2

    def submit(self, work: Any, batch: Sequence[int]) -> tuple[int, ...]:
        self.flying += 1
        self.most = max(self.most, self.flying)
        self.alone.append(self.flying == 1)
        return tuple(batch)

    def finished(self, handles: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [handles[-1]]

    def answer(self, handle: tuple[int, ...]) -> elsewhere.Answer:
        self.flying -= 1
        if self.lost(handle):
            raise elsewhere.LostError("gone")
        return elsewhere.attempt(_square, handle)


def _square(number: int) -> int:
    return number * number


@given(count=st.integers(0, 700), lost=st.sets(st.integers(0, 700), max_size=5))
def test_every_item_is_done_once_and_few_are_in_flight(count, lost):
    """A batch with one of `lost` in it is lost once."""
    left, heard = set(lost), []

    def ends(batch: Sequence[int]) -> bool:
        found = left & set(batch)
        left.difference_update(found)
        return bool(found)

    crowd = Threads(ends)
    results = elsewhere.gathered(crowd, _square, range(count), lambda one, result: heard.append((one, result)))
    assert results == [number * number for number in range(count)]
    assert sorted(heard) == list(enumerate(results))
    assert crowd.most <= 2 * elsewhere.IN_FLIGHT


@given(count=st.integers(1, 300), data=st.data())
def test_an_item_that_ends_its_workers_is_named_and_no_other(count, data):
    bad, heard = data.draw(st.integers(0, count - 1)), []
    with pytest.raises(LoraCheckError, match=rf"every worker that was given {bad} ended") as told:
        elsewhere.gathered(Threads(lambda batch: bad in batch), _square, range(count), lambda one, _: heard.append(one))
    assert "memory" in told.value.hint
    assert bad not in heard
    assert len(set(heard)) == len(heard)


def test_an_error_in_words_is_an_answer_and_what_came_before_it_counts():
    def work(number: int) -> int:
        if number == 2:
            raise UsageError("two is too many", hint="take one")
        return number

    heard: list[int] = []
    crowd = Threads(lambda batch: False)
    crowd.answer = lambda handle: elsewhere.attempt(work, handle)
    with pytest.raises(UsageError, match="two is too many") as told:
        elsewhere.gathered(crowd, work, [2], lambda one, _: heard.append(one))
    assert told.value.hint == "take one"
    assert elsewhere.attempt(work, [0, 1, 2, 3]).results == [0, 1]


# -------------------------------------------------------------------------------------------------------- dask


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two processes, of which one may be killed."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 2}),
        LocalCluster(n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address="localhost:0") as all_,
        Client(all_) as found,
    ):
        yield found


def killing(workers: Callable[[], list[int]], after: int, killed: list[int]) -> Any:
    """A progress that stops all workers when so many items are done, lets work pile up before them, and kills one."""

    def end(pids: list[int]) -> None:
        killed.append(pids[0])
        os.kill(pids[0], signal.SIGKILL)
        for pid in pids[1:]:
            os.kill(pid, signal.SIGCONT)

    @contextmanager
    def progress(*_: Any) -> Iterator[Any]:
        seen: list[int] = []

        def advance(size: int) -> None:
            seen.append(size)
            if len(seen) == after and not killed:
                pids = workers()
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
                Timer(1.0, end, [pids]).start()

        yield advance

    return progress


@pytest.mark.parametrize("broken", [False, True])
def test_a_report_by_dask_is_that_of_threads_though_a_worker_is_killed(broken, models, here, client):
    killed: list[int] = []
    ours = killing(lambda: list(client.run(os.getpid).values()), 5, killed)
    assert report(models[broken], "dask", progress=ours) == here[broken]
    assert killed
    assert killed[0] not in client.run(os.getpid).values()


def test_an_error_on_a_dask_worker_comes_back_as_it_is(errand, client):
    asked, one, folder = errand
    (folder / "merged").rename(folder / "elsewhere")
    with pytest.raises(NotFoundError, match=r"a worker on .*merged") as told:
        engine.run(_errand(asked), [one], 2, print)
    assert told.value.hint == distributed.SAME_FILES


def _errand(asked: distributed.Errand) -> Any:
    from functools import partial

    return partial(distributed.perform, asked)


def test_an_item_that_ends_dask_workers_is_one_clear_error(client):
    heard: list[str] = []
    deadly = "__import__('os')._exit(1)"
    with pytest.raises(LoraCheckError, match=r"every worker that was given __import__.* ended before it answered"):
        engine.run(eval, ["1", deadly, "2", "3"], 2, lambda one, _: heard.append(one))
    assert set(heard) <= {"1", "2", "3"}  # those that shared a worker with it are suspects too
    assert len(set(heard)) == len(heard)


STRANGERS = {
    "nothing": ("", "cannot load this version of lora_check: .*lora_check.fingerprint"),
    "older": ("def programs():\n    return {'lora_check': '0.0.1'}\n", r"has lora_check 0\.0\.1, not "),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_a_dask_worker_of_another_version_is_refused_before_it_is_given_anything(case, tmp_path):
    source, message = STRANGERS[case]
    (tmp_path / "lora_check").mkdir()
    for name, text in {"__init__": "", **({"fingerprint": source} if source else {})}.items():
        (tmp_path / "lora_check" / f"{name}.py").write_text(text)
    with LocalCluster(n_workers=0, dashboard_address="localhost:0") as empty, Client(empty) as found:
        argv = ["-m", "distributed.cli.dask_worker", empty.scheduler_address, "--no-nanny", "--no-dashboard"]
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        with subprocess.Popen([sys.executable, *argv], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL) as worker:
            found.wait_for_workers(1, timeout=60)
            with pytest.raises(UsageError, match=f"the dask worker at tcp://.* {message}"):
                engine.run(abs, [-1], 1, print)
            worker.terminate()
            worker.wait()
            engine.close()


def test_a_scheduler_that_does_not_answer_is_a_usage_error():
    script = (
        "from lora_check.engines.dask import run\nfrom lora_check.errors import UsageError\n"
        "try:\n    run(abs, [1], 1, print)\nexcept UsageError as error:\n    print(error.message, '|', error.hint)\n"
    )
    told = {"DASK_SCHEDULER_ADDRESS": "tcp://127.0.0.1:1", "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1s"}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **told})
    assert found.stdout.startswith("no dask scheduler answers at tcp://127.0.0.1:1 | unset DASK_SCHEDULER_ADDRESS")
    assert found.stderr == ""


def test_an_address_where_no_ray_answers_is_a_usage_error(monkeypatch):
    from lora_check.engines.ray import run

    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UsageError, match=r"no ray cluster answers at 127\.0\.0\.1:1"):
        run(abs, [1], 1, print)


def test_the_command_line_starts_and_ends_its_own_workers_and_says_nothing_of_them(models, here, tmp_path):
    script = (
        "import sys, psutil\nfrom lora_check.__main__ import main\n"
        "if __name__ == '__main__':\n    code = main(sys.argv[1:])\n"
        "    left = [one.cmdline() for one in psutil.Process().children(recursive=True)]\n"
        "    assert not [one for one in left if 'spawn_main' in ' '.join(one)], left\n    sys.exit(code)\n"
    )
    (tmp_path / "script.py").write_text(script)
    argv = ["report", *models[True], "--engine", "dask", "--jobs", "2", "--json", str(tmp_path / "report.json")]
    with socket.socket() as dashboard:
        with suppress(OSError):  # another cluster has this port already
            dashboard.bind(("127.0.0.1", 8787))
            dashboard.listen()
        done = subprocess.run([sys.executable, tmp_path / "script.py", *argv], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 1
    assert many.plain(json.loads((tmp_path / "report.json").read_text())) == here[True]


def test_no_library_of_workers_is_imported_before_it_is_asked_for():
    script = (
        "import sys\nfrom lora_check.registry import load\nassert {'local', 'dask', 'ray'} <= set(load('engines'))\n"
        "print(sorted({'dask', 'distributed', 'ray', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "[]\n"


@pytest.mark.parametrize("name", ["dask", "ray"])
def test_tensors_in_memory_are_not_sent_to_other_processes(name):
    from lora_check.means import refuse_what_cannot_be

    tensors = {"a.weight": torch.zeros(2, 2)}
    with pytest.raises(UsageError, match=f"engine {name} needs locations"):
        refuse_what_cannot_be(Request(base=tensors, adapters=("x",), merged="y"), Means(engine=name))


# --------------------------------------------------------------------------------------------------------- ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two processes of ray, which is too large to be installed for these tests alone."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    import warnings

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=60)
        yield ray
        ray.shutdown()


@pytest.mark.parametrize("broken", [False, True])
def test_a_report_by_ray_is_that_of_threads_though_a_worker_is_killed(broken, models, here, cluster):
    import psutil

    def workers() -> list[int]:
        every = psutil.Process().children(recursive=True)
        return [one.pid for one in every if (one.cmdline() or [""])[0] in ("ray::attempt", "ray::IDLE")]

    killed: list[int] = []
    assert report(models[broken], "ray", progress=killing(workers, 5, killed)) == here[broken]
    assert killed
    assert not psutil.pid_exists(killed[0])


def test_an_item_that_ends_ray_workers_is_one_clear_error(cluster):
    from lora_check.engines import ray as engine

    heard: list[str] = []
    with pytest.raises(LoraCheckError, match=r"every worker that was given __import__.* ended before it answered"):
        engine.run(eval, ["1", "__import__('os')._exit(1)", "2"], 2, lambda one, _: heard.append(one))
    assert sorted(heard) == ["1", "2"]


def test_an_error_on_a_ray_worker_comes_back_as_it_is(errand, cluster):
    from lora_check.engines import ray as engine

    asked, one, folder = errand
    (folder / "merged").rename(folder / "elsewhere")
    with pytest.raises(NotFoundError, match=r"a worker on .*merged") as told:
        engine.run(_errand(asked), [one], 2, print)
    assert told.value.hint == distributed.SAME_FILES

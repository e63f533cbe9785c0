"""Hold what reads files against the files: where tensors lie, reading ahead, plain reads, the speed that is told."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lora_check
from lora_check.commands import _output
from lora_check.errors import InputError
from lora_check.formats.safetensors import SafetensorsCheckpoint, open_path
from lora_check.inputs import opened_inputs
from lora_check.items import items, sizes_of
from lora_check.links import Piece, Realigned, Region
from lora_check.plan import make_plan
from lora_check.reading import ahead as ahead_of
from lora_check.reading import plain
from lora_check.reading.ahead import Ahead, read_ahead
from lora_check.reading.meter import memory_rate, metered
from lora_check.reading.plain import PlainFile, Stretch, is_plain, kind_of, reading
from lora_check.reading.ranges import BLOCK, Range, in_step
from lora_check.reading.stamps import refuse_changed, stamps
from lora_check.reading.throughput import Throughput
from lora_check.reading.throughput import speed as summary_of
from lora_check.reading.touched import ranges, touched

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "lora_check" / "data" / "demo"
MIB = 1 << 20


def tensors() -> dict[str, torch.Tensor]:
    """Shapes and dtypes that are easily mistaken for one another."""
    made = torch.Generator().manual_seed(7)
    return {
        "wide": torch.randn(37, 24, generator=made).to(torch.bfloat16),
        "stack": torch.randn(5, 6, 7, generator=made),
        "codes": torch.randint(0, 255, (9, 3), generator=made, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "small": torch.randn(4, 5, generator=made).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "nothing": torch.empty(0, 8),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def opened(file: Path) -> Iterator[SafetensorsCheckpoint]:
    checkpoint = open_path(file)
    yield checkpoint
    checkpoint.close()


@pytest.fixture
def plainly(file: Path) -> Iterator[SafetensorsCheckpoint]:
    with reading("plain"):
        checkpoint = open_path(file)
    yield checkpoint
    checkpoint.close()


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def at(place: Range) -> bytes:
    with place.path.open("rb") as opened:
        opened.seek(place.offset)
        return opened.read(place.length)


# ------------------------------------------------------------------------------------------------- where it lies


@pytest.mark.parametrize("name", [name for name, tensor in tensors().items() if tensor.dim()])
def test_a_range_holds_the_bytes_of_its_tensor(opened: SafetensorsCheckpoint, name: str) -> None:
    (place,) = ranges(opened, [name])
    assert at(place) == raw(tensors()[name])


def test_what_is_put_together_lies_where_its_sources_lie(opened: SafetensorsCheckpoint) -> None:
    piece = Piece(source="wide", taken=Region(rows=(0, 5)), placed=Region())
    seen = Realigned(opened, {"new": [piece, piece]}, opened.metas())
    assert ranges(seen, ["new", "codes"]) == ranges(opened, ["wide", "codes"])


def test_tensors_in_memory_lie_nowhere() -> None:
    with opened_inputs({"w": torch.ones(2, 2)}, str(DEMO / "adapter"), str(DEMO / "merged")) as found:
        assert ranges(found.base, ["w"]) == ()
        assert ranges(found.merged, found.merged.metas()) != ()


def test_two_tensors_are_read_in_step() -> None:
    long, short = Range(Path("a"), 100, 2 * BLOCK + 5), Range(Path("b"), 7, BLOCK)
    found = list(in_step([long], [short]))
    assert [(one.path.name, one.offset) for one in found] == [
        ("a", 100),
        ("b", 7),
        ("a", 100 + BLOCK),
        ("a", 100 + 2 * BLOCK),
    ]
    assert sum(one.length for one in found) == long.length + short.length


def test_items_touch_both_models_whole_and_once() -> None:
    with opened_inputs(*(str(DEMO / name) for name in ("base", "adapter", "merged"))) as found:
        plan = make_plan(*found)
        for item in items(plan):
            name = plan.pairings[item.place].merged.name
            whole = touched(plan, item, found.base, found.merged)
            assert sorted(whole) == sorted(ranges(found.merged, [name]) + ranges(found.base, [name]))
            height = plan.pairings[item.place].merged.shape[0]
            halves = [replace(item, rows=rows) for rows in ((0, height // 2), (height // 2, height))]
            first, second = (touched(plan, half, found.base, found.merged) for half in halves)
            for one, low, high in zip(whole, first, second, strict=True):
                assert (low.offset, low.offset + low.length) == (one.offset, high.offset)
                assert high.offset + high.length == one.offset + one.length


# ------------------------------------------------------------------------------------------------- reading ahead


@pytest.fixture
def cold(tmp_path: Path) -> Range:
    """A file that lies on the disk and not in memory."""
    path = tmp_path / "cold"
    path.write_bytes(os.urandom(MIB) * 24)
    if not until(lambda: forgotten(path)):
        pytest.skip("this file system keeps in memory what it is told to forget")
    return Range(path, 0, 24 * MIB)


def forgotten(path: Path) -> bool:
    """Whether the system has let go of every page; it keeps those that are still being written."""
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return not any(in_memory(path, offset) for offset in range(MIB // 2, path.stat().st_size, MIB))


def in_memory(path: Path, offset: int) -> bool:
    with path.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # to look may bring this page, and no other
        try:
            return os.preadv(opened.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False


def until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return found


def cut(whole: Range, length: int) -> list[Range]:
    return [Range(whole.path, start, length) for start in range(0, whole.length, length)]


def test_a_cold_file_is_in_memory_before_it_is_touched(cold: Range) -> None:
    with read_ahead(cut(cold, 4 * MIB)) as ahead:
        assert until(lambda: ahead.cold.size == cold.length)
    assert all(in_memory(cold.path, offset) for offset in range(4095, cold.length, MIB))
    assert ahead.cold.seconds > 0
    assert ahead.cold.cpu_seconds > 0


def test_what_is_in_memory_is_not_read_again(cold: Range) -> None:
    cold.path.read_bytes()
    with read_ahead(cut(cold, 4 * MIB)) as ahead:
        assert until(lambda: ended(ahead))
    assert ahead.cold.size == 0


def test_readers_stay_within_the_window_and_follow_the_compute(cold: Range) -> None:
    with read_ahead(cut(cold, 2 * MIB), window=6 * MIB, threads=3) as ahead:
        assert until(lambda: ahead.cold.size == 6 * MIB)
        time.sleep(0.05)
        assert ahead.cold.size == 6 * MIB
        ahead.advance(4 * MIB)
        assert until(lambda: ahead.cold.size == 10 * MIB)
        assert not ended(ahead)


def test_what_the_compute_has_passed_is_left_out(cold: Range) -> None:
    with read_ahead(cut(cold, 4 * MIB), window=4 * MIB, threads=1) as ahead:
        assert until(lambda: ahead.cold.size == 4 * MIB)
        ahead.advance(20 * MIB)
        assert until(lambda: ended(ahead))
    assert ahead.cold.size <= 12 * MIB  # the first, the last, and the one that was waited for


def test_readers_end_with_the_pass(cold: Range) -> None:
    began = time.monotonic()
    with read_ahead(cut(cold, MIB) * 1000, window=MIB) as ahead:
        assert until(lambda: ahead.cold.size > 0)
    assert ended(ahead)
    assert time.monotonic() - began < 5


def test_what_cannot_be_read_ahead_is_no_error(tmp_path: Path, cold: Range) -> None:
    (tmp_path / "short").write_bytes(b"short")
    wrong = [Range(tmp_path / "absent", 0, 9), Range(tmp_path, 0, 9), Range(tmp_path / "short", 0, 9)]
    with read_ahead([*wrong, *cut(cold, 4 * MIB)]) as ahead:
        assert until(lambda: ended(ahead))
    assert in_memory(cold.path, 20 * MIB)
    assert ahead._hopeless == {tmp_path / "short"}  # of which the bytes that were asked for never come


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no file system in memory")
def test_a_file_system_that_cannot_say_is_asked_by_the_clock() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(bytes(MIB))
        file.flush()
        with read_ahead([Range(Path(file.name), start, 4096) for start in range(0, MIB, 4096)]) as ahead:
            assert until(lambda: ended(ahead))
    assert ahead.cold.size < MIB // 2


def test_without_the_calls_nothing_is_read_ahead(cold: Range, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_of, "SUPPORTED", False)
    with read_ahead([cold]) as ahead:
        ahead.advance(5)
        assert ended(ahead)
    assert not in_memory(cold.path, 0)


def ended(ahead: Ahead) -> bool:
    return not any(thread.is_alive() for thread in ahead._threads)


# --------------------------------------------------------------------------------------------------- plain reads


@pytest.mark.parametrize("name", tensors())
def test_a_plain_read_gives_what_a_mapping_gives(
    opened: SafetensorsCheckpoint, plainly: SafetensorsCheckpoint, name: str
) -> None:
    mapped, read = opened.read(name), plainly.read(name)
    assert (read.shape, read.dtype) == (mapped.shape, mapped.dtype)
    assert raw(read) == raw(mapped) == raw(tensors()[name])


@pytest.mark.parametrize("large", [1, 50, 100])
def test_rows_are_those_of_the_tensor_in_any_order(
    plainly: SafetensorsCheckpoint, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "LARGE", large)
    for name in ("wide", "stack", "codes", "small", "flags") if large == 1 else ("wide", "stack"):
        rows, whole = plainly.rows(name), tensors()[name]
        assert rows
        assert (rows.shape, rows.dtype) == (tuple(whole.shape), whole.dtype)
        for span in (slice(0, 2), slice(1, 4), slice(3, None), slice(0, 1), slice(2, 2), slice(-1, None), slice(None)):
            assert raw(rows[span]) == raw(whole[span]), (name, span)


def test_rows_that_are_held_are_never_read_over(
    plainly: SafetensorsCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "LARGE", 1)
    rows, whole = plainly.rows("wide"), tensors()["wide"]
    assert rows
    first = rows[0:3]
    view = first[1:2]
    del first
    again = [rows[start : start + 3] for start in (3, 6, 9)]
    assert raw(view) == raw(whole[1:2])
    assert [raw(one) for one in again] == [raw(whole[start : start + 3]) for start in (3, 6, 9)]
    del again, view
    place = rows[12:15].data_ptr()
    assert rows[15:18].data_ptr() == place  # which nobody holds any more


def test_only_what_is_large_and_not_mapped_is_offered_by_rows(
    opened: SafetensorsCheckpoint, plainly: SafetensorsCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plainly.rows("wide") is None
    monkeypatch.setattr(plain, "LARGE", 1)
    assert plainly.rows("wide")
    assert opened.rows("wide") is None


def test_a_dtype_that_nobody_knows_is_not_guessed_from_its_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "LARGE", 1)
    head = json.dumps({"w": {"dtype": "FLOAT", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + bytes(16))
    with reading("plain"):
        checkpoint = open_path(file)
    for deed in (checkpoint.read, checkpoint.rows):
        with pytest.raises(InputError, match=r"'w' of .* is stored as float, which cannot be read"):
            deed("w")


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 40)


def rewrite(file: Path) -> None:
    later = file.stat().st_mtime_ns + 5_000_000
    os.utime(file, ns=(later, later))


def swap(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes())
    other.replace(file)


DEEDS = ((shorten, r"changed from \d+ to \d+ bytes"), (rewrite, "was written to"), (swap, "was replaced"))


@pytest.mark.parametrize(("deed", "said"), DEEDS[:2])
def test_a_file_that_changes_under_a_plain_read_is_told(
    file: Path, plainly: SafetensorsCheckpoint, deed: Callable[[Path], None], said: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(plain, "LARGE", 1)
    rows = plainly.rows("wide")
    assert rows
    assert plainly.read("wide").shape
    deed(file)
    for read in (lambda: plainly.read("wide"), lambda: rows[0:2]):
        with pytest.raises(InputError, match=f"model.safetensors {said} while it was being checked"):
            read()


@pytest.mark.parametrize(("deed", "said"), DEEDS)
def test_a_file_that_changes_before_it_is_touched_is_told(
    file: Path, opened: SafetensorsCheckpoint, deed: Callable[[Path], None], said: str
) -> None:
    before = stamps(opened)
    refuse_changed(before)
    deed(file)
    for look in (lambda: opened.read("wide"), lambda: refuse_changed(before)):
        with pytest.raises(InputError, match=f"model.safetensors {said} while it was being checked"):
            look()


def test_a_file_that_went_away_is_told(file: Path, opened: SafetensorsCheckpoint) -> None:
    before = stamps(opened)
    file.unlink()
    with pytest.raises(InputError, match="went away"):
        refuse_changed(before)


def test_a_read_that_ends_early_is_told(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(10))
    one = Stretch(name="w", offset=4, length=8, shape=(2, 4), dtype="uint8")
    short = PlainFile(tmp_path / "short", [one])
    with pytest.raises(InputError, match=r"'w' of .*short cannot be read: the file ends at byte 10"):
        short.get_tensor("w")
    short.close()


def test_a_device_that_fails_is_told() -> None:
    one = Stretch(name="w", offset=0, length=8, shape=(8,), dtype="uint8")
    broken = PlainFile(Path("/proc/self/mem"), [one])  # nothing is mapped at 0: input/output error
    with pytest.raises(InputError, match="tensor 'w' of /proc/self/mem cannot be read: input/output error"):
        broken.get_tensor("w")
    broken.close()
    with pytest.raises(InputError, match="absent cannot be read: no such file"):
        PlainFile(Path("/absent"), [])


MOUNTS = """\
/dev/sda / ext4 rw 0 0
server:/x /data nfs4 rw,vers=4.2 0 0
/dev/sdb /data/local xfs rw 0 0
//nas/s /mnt/my\\040share cifs rw 0 0
/dev/sdc /over ext4 rw 0 0
bucket /over fuse.gcsfuse rw 0 0
damaged
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/models/a", "ext4"),
        ("/data/a/b", "nfs4"),
        ("/data", "nfs4"),
        ("/database/a", "ext4"),
        ("/data/local/a", "xfs"),
        ("/mnt/my share/a", "cifs"),
        ("/over/a", "fuse.gcsfuse"),
    ],
)
def test_the_nearest_mount_tells_the_kind(path: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    assert kind_of(Path(path), tmp_path / "mounts") == kind
    assert kind_of(Path(path), tmp_path / "absent") == ""


NEAR = ("ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "fuseblk", "virtiofs", "apfs", "nfsd", "")
FAR = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse", "fuse.sshfs", "lustre", "gpfs", "beegfs", "ceph", "afs")


@pytest.mark.parametrize("kind", [*NEAR, *FAR])
def test_network_mounts_are_read_and_disks_are_mapped(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "mounts").write_text(f"x {tmp_path.resolve()} {kind} rw 0 0\n")
    monkeypatch.setattr(kind_of, "__defaults__", (tmp_path / "mounts",))
    assert is_plain(tmp_path / "a") is (kind in FAR)
    with reading("plain"):
        assert is_plain(tmp_path / "a")
    with reading("map"):
        assert not is_plain(tmp_path / "a")


def test_a_check_says_the_same_however_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "LARGE", 1000)
    given = [str(DEMO / name) for name in ("base", "adapter", "merged")]
    told = []
    for how, jobs in (("map", 1), ("plain", 1), ("plain", 3)):
        with reading(how):  # type: ignore[arg-type]
            report = lora_check.check(given[0], [given[1]], given[2], jobs=jobs)
        found = report.as_dict()
        told.append({key: value for key, value in found.items() if key != "summary"})
        assert found["summary"]["verified"] > 0
    assert told[0] == told[1] == told[2]


# ----------------------------------------------------------------------------------------------------- the speed


def speed(**changes: Any) -> Throughput:
    usual = {"size": 10**10, "seconds": 10.0, "cpu_seconds": 19.0, "workers": 2, "memory_rate": 8e9}
    return Throughput(**{**usual, **changes})


@pytest.mark.parametrize(
    ("one", "bound"),
    [
        (speed(), "compute"),
        (speed(cpu_seconds=9.5), None),
        (speed(cpu_seconds=9.5, workers=1), "compute"),
        (speed(memory_rate=1.1e9), "memory"),
        (speed(memory_rate=None), "compute"),
        (speed(cpu_seconds=9.5, cold=10**10, cold_seconds=9.0), "storage"),
        (speed(cpu_seconds=9.5, cold=10**10, cold_seconds=4.0), None),
        (speed(cpu_seconds=19.0, cold=10**10, cold_seconds=9.0), "compute"),
        (speed(seconds=0.0), None),
    ],
)
def test_what_is_always_at_work_is_what_binds(one: Throughput, bound: str | None) -> None:
    assert one.bound == bound


@pytest.mark.parametrize(
    ("one", "ceiling"),
    [
        (speed(), 8e9),
        (speed(memory_rate=None), None),
        (speed(cold=10**10, cold_seconds=5.0), 2e9),
        (speed(cold=5 * 10**9, cold_seconds=4.0), 1e10 / (4.0 + 0.625)),
    ],
)
def test_the_ceiling_is_that_of_the_files_as_they_lay(one: Throughput, ceiling: float | None) -> None:
    assert one.ceiling == pytest.approx(ceiling)


def test_the_summary_tells_the_speed() -> None:
    assert speed(cold=10**10, cold_seconds=5.0).as_dict() == {
        "cpu_seconds": 19.0,
        "gb_per_second": 1.0,
        "read_ceiling_gb_per_second": 2.0,
        "bound": "compute",
    }
    assert summary_of(None) == dict.fromkeys(speed().as_dict())


def test_a_pass_is_timed_and_counted() -> None:
    with opened_inputs(*(str(DEMO / name) for name in ("base", "adapter", "merged"))) as found:
        plan = make_plan(*found)
        asked = items(plan)
        with metered(plan, asked, found.base, found.merged, workers=1) as meter:
            for item in asked[1:]:
                meter.done(item)
            busy = time.process_time() + 0.05
            while time.process_time() < busy:
                pass
        with metered(plan, asked, found.base, found.merged, workers=1, here=False) as elsewhere:
            for item in asked[1:]:
                elsewhere.done(item)
    one = meter.throughput
    assert one
    assert elsewhere.size == meter.size
    assert one.size == sum(sizes_of(plan, asked[1:])) < sum(sizes_of(plan, asked))
    assert 0.04 <= one.cpu_seconds <= one.seconds + 0.02
    assert one.memory_rate is None  # too small a pass to time the memory for


def test_memory_is_timed_on_the_files_themselves(cold: Range) -> None:
    cold.path.read_bytes()
    began = time.monotonic()
    rate = memory_rate(list(in_step([Range(cold.path, 13, cold.length - 13)])), 2)
    assert time.monotonic() - began < 5
    assert rate
    assert 1e8 < rate < 1e12
    assert memory_rate([Range(cold.path, 0, 100)], 2) is None
    with reading("plain"):
        assert memory_rate([cold], 1) is None


# ------------------------------------------------------------------------------------------------------ progress

WATCHED = """
import time
from lora_check.commands import _output
progress = _output.progress()
assert progress, "nobody watches"
with progress(3_000_000_000, "comparing", "B") as advance:
    for _ in range(3):
        time.sleep(0.55)
        advance(900_000_000)
with progress(7, "naming mistakes", "tensor") as advance:
    time.sleep(0.55)
    advance(3)
print("the report")
"""


def test_a_terminal_shows_bytes_rate_and_time_left() -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 120))
    child = subprocess.Popen([sys.executable, "-c", WATCHED], stderr=slave, stdout=subprocess.PIPE, cwd=ROOT)
    seen = b""
    while child.poll() is None or select.select([master], [], [], 0.1)[0]:
        seen += os.read(master, 4096) if select.select([master], [], [], 0.1)[0] else b""
    os.close(slave)
    os.close(master)
    assert child.communicate()[0] == b"the report\n"
    text = seen.decode()
    assert re.search(r"comparing: +90%.*2\.70G/3\.00G \[\d\d:\d\d<\d\d:\d\d, .*B/s\]", text)
    assert re.search(r"naming mistakes: +43%.*3/7 \[\d\d:\d\d<\d\d:\d\d, .*tensor/s\]", text)
    assert text.rindex("comparing") < text.index("naming mistakes")
    assert text.split("\r")[-1].strip() == ""  # nothing is left behind


def test_a_pipe_shows_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "nobody watches" in done.stderr


def test_the_time_left_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_output, "INTERVAL", 0.01)
    rates = []
    with _output._bar(10_000) as advance:
        for step, count in ((100, 10), (1, 40)):
            for _ in range(count):
                time.sleep(0.012)
                advance(step)
            rates.append(advance.__self__.format_dict["rate"])  # type: ignore[attr-defined]
    fast, slow = rates
    assert 0 < slow < fast / 10  # the mean of the whole is a fifth

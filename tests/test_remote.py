"""What lies elsewhere is judged as what lies here: the same reports, only the bytes needed, no doubt left unsaid."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import corrupt
import fsspec
import pytest
import torch
from remote_server import HubHandler, Server, serving
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_check import folders, locations
from lora_check.__main__ import main
from lora_check.errors import (
    CorruptCheckpointError,
    InputError,
    LoraCheckError,
    NotFoundError,
    UsageError,
    WrongInputError,
)
from lora_check.locations import open_checkpoint
from lora_check.pipeline import check
from lora_check.remote import place, rows, small, store, web

DEMO = Path(__file__).parents[1] / "lora_check" / "data" / "demo"
RANK, ALPHA = 6, 15
LARGE, SMALL = (2560, 1024), (96, 64)
"""bf16: 5 MiB are fetched by rows, 12 KiB whole."""
TARGETS = {
    "model.layers.0.self_attn.q_proj": LARGE,
    "model.layers.1.self_attn.q_proj": LARGE,
    "model.layers.1.self_attn.k_proj": SMALL,
}
MiB = 1 << 20


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PAUSES", (0.01, 0.01, 0.02))


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ adapter/ merged/ of a small model with large tensors; nobody may change them."""
    root = tmp_path_factory.mktemp("remote-world")
    torch.manual_seed(7)
    base = {f"{name}.weight": torch.randn(shape).bfloat16() for name, shape in TARGETS.items()}
    base |= {
        "model.norm.weight": torch.randn(64).bfloat16(),
        "model.embed_tokens.weight": torch.randn(40, 64).bfloat16(),
    }
    merged, factors = dict(base), {}
    for name, (height, width) in TARGETS.items():
        a, b = torch.randn(RANK, width) / 8, torch.randn(height, RANK) / 8
        factors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        merged[f"{name}.weight"] = (base[f"{name}.weight"].float() + ALPHA / RANK * (b @ a)).bfloat16()
    for folder, tensors, file in (
        ("base", base, "model.safetensors"),
        ("merged", merged, "model.safetensors"),
        ("adapter", factors, "adapter_model.safetensors"),
    ):
        (root / folder).mkdir()
        save_file(tensors, root / folder / file, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "k_proj"]}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    for folder in ("base", "merged"):
        (root / folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    return root


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A copy of the demonstration, which may be spoilt."""
    return Path(shutil.copytree(DEMO, tmp_path / "world"))


@pytest.fixture
def server(world: Path) -> Iterator[Server]:
    with serving(world) as running:
        yield running


@pytest.fixture
def far(large: Path) -> Iterator[Server]:
    """A server of the large tensors."""
    with serving(large) as running:
        yield running


def spoil(folder: Path, name: str = "model.layers.1.self_attn.q_proj.weight") -> None:
    """Change one number of a merged model."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def report(root: str, shown: str = "", **options: Any) -> dict[str, Any]:
    """The report of the world under a root, without its places and times."""
    told = check(f"{root}/base", f"{root}/adapter", f"{root}/merged", **options).as_dict()
    text = json.dumps(told).replace(shown or root, "")
    times = r'"(\w*seconds|gb_per_second|read_ceiling\w*|bound)": [^,}]+'
    found: dict[str, Any] = json.loads(re.sub(times, r'"\1": 0', text))
    return found


def refused(kind: type[LoraCheckError], location: str, role: Any = "base") -> str:
    """What opening says, in one line led by the role."""
    with pytest.raises(kind) as caught:
        open_checkpoint(location, role=role)
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message
    return caught.value.message


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


# ---------------------------------------------------------------------------------------- the same reports


@pytest.mark.parametrize("spoilt", [False, True], ids=["healthy", "broken"])
def test_a_report_from_afar_is_that_of_the_local_files(world, server, spoilt) -> None:
    if spoilt:
        spoil(world / "merged")
    local, remote = report(str(world)), report(server.url, jobs=3)
    assert remote == local
    assert remote["verdict"] == ("refuted" if spoilt else "verified")


def test_large_tensors_are_judged_by_rows_as_they_are_whole(large, far) -> None:
    local, remote = report(str(large)), report(far.url, jobs=2)
    assert remote == local
    assert remote["verdict"] == "verified"


def test_the_command_line_takes_urls(server, capsys) -> None:
    assert main(["report", *(f"{server.url}/{name}" for name in ("base", "adapter", "merged"))]) == 0
    spoil(server.root / "merged")
    assert main(["report", *(f"{server.url}/{name}" for name in ("base", "adapter", "merged"))]) == 1
    assert f"{server.url}/merged" in capsys.readouterr().out


def test_side_files_are_compared_from_afar(world, server) -> None:
    (world / "merged" / "tokenizer.json").unlink()
    local, remote = report(str(world)), report(server.url)
    assert "LC315" in {one["code"] for one in remote["findings"]}
    assert remote == local


def rival(world: Path) -> None:
    """Shards beside model.safetensors, with other numbers."""
    tensors = load_file(world / "base" / "model.safetensors")
    save_file(tensors, world / "merged" / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (world / "merged" / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter_beside(world: Path) -> None:
    for file in (world / "adapter").iterdir():
        shutil.copy(file, world / "merged")


def trained_beside(world: Path) -> None:
    (world / "adapter" / "non_lora_trainables.bin").write_bytes(b"x")


@pytest.mark.parametrize(("spoils", "code"), [(rival, "LC009"), (adapter_beside, "LC010"), (trained_beside, "LC221")])
@pytest.mark.parametrize("kind", ["web", "listed"])
def test_what_lies_beside_keeps_a_remote_report_from_being_verified(world, spoils, code, kind) -> None:
    spoils(world)
    with serving(world) as running:
        root = running.url if kind == "web" else in_memory(world)
        local, remote = report(str(world)), report(root)
    assert remote["verdict"] == "inconclusive"
    assert code in {one["code"] for one in remote["findings"]}
    assert remote == local


def test_every_name_that_may_decide_is_asked_for_where_nothing_is_listed() -> None:
    sides = {name for names in folders.SIDES.values() for name in names if "*" not in name}
    decides = {*sides, folders.FIRST, folders.SECOND, *locations.ADAPTERS, *locations.PICKLES, locations.ADAPTER_CONFIG}
    assert decides <= {*place.KNOWN}
    assert {"config.json", "tokenizer_config.json"} <= {*place.KNOWN}


# ------------------------------------------------------------------------------------- only the bytes needed


def test_one_layer_costs_headers_and_its_own_bytes(far) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    found = report(far.url, include=[name], jobs=2)
    assert found["verdict"] == "inconclusive"
    assert found["summary"]["verified"] == 1
    needed = 2 * 2 * LARGE[0] * LARGE[1] + 4 * RANK * sum(LARGE)
    assert needed <= far.sent <= 1.1 * needed + MiB


def test_a_plan_costs_headers_alone(server) -> None:
    for role in ("base", "merged"):
        open_checkpoint(f"{server.url}/{role}", role=role).close()
    assert server.sent < MiB / 2
    weights = [one for one in server.requests if one.path == "/base/model.safetensors"]
    assert len(weights) == 2


def test_a_whole_tensor_is_fetched_once_and_exactly(large, far) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    with closing(open_checkpoint(f"{far.url}/base", role="base")) as opened:
        before = far.sent
        found = opened.read(name)
        assert far.sent - before == found.nbytes
    assert torch.equal(bits(found), bits(load_file(large / "base" / "model.safetensors")[name]))


def test_every_dtype_and_shape_comes_through(tmp_path) -> None:
    torch.manual_seed(0)
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool)
    tensors = {str(one): torch.randn(3, 5).to(one) for one in dtypes}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "ints": torch.arange(7)}
    save_file(tensors, tmp_path / "model.safetensors")
    with serving(tmp_path) as running, closing(open_checkpoint(running.url, role="base")) as opened:
        for name, tensor in tensors.items():
            found = opened.read(name)
            assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
            assert torch.equal(bits(found.reshape(-1)), bits(tensor.reshape(-1)))


def test_small_tensors_are_fetched_once_and_nobody_writes_into_anothers(server) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    with closing(open_checkpoint(f"{server.url}/adapter", role="adapter")) as opened:
        before = len(server.requests)
        with ThreadPoolExecutor(4) as threads:
            first, *others = threads.map(opened.read, [name] * 4)
        assert len(server.requests) == before + 1
        first.zero_()
        assert all(one.any() for one in [*others, opened.read(name)])


def test_small_tensors_are_let_go_of_and_failures_are_not_kept(monkeypatch) -> None:
    monkeypatch.setattr(small, "KEPT", 3 * 400)
    kept, fetched = small.Small(), []

    def fetch(name: str) -> Tensor:
        fetched.append(name)
        if len(fetched) == 1:
            raise InputError("once")
        return torch.zeros(100)

    with pytest.raises(InputError, match="once"):
        kept.get("a", lambda: fetch("a"))
    for name in "abcdcba":
        kept.get(name, lambda name=name: fetch(name))
    assert fetched == ["a", "a", "b", "c", "d", "a"]


# ---------------------------------------------------------------------------------------------------- rows


class Bytes:
    """A tensor somewhere else: fills buffers, and remembers which bytes were asked for."""

    def __init__(self, tensor: Tensor, failures: int = 0) -> None:
        self.raw, self.asked, self.failures = (
            tensor.reshape(-1).view(torch.uint8).numpy(),
            list[tuple[int, int]](),
            failures,
        )
        self.lock = threading.Lock()

    def __call__(self, at: int, into: memoryview) -> None:
        with self.lock:
            self.asked.append((at, at + len(into)))
            self.failures -= 1
        if self.failures >= 0:
            raise InputError("no answer")
        into[:] = self.raw[at : at + len(into)].data

    @property
    def fetched(self) -> int:
        return sum(stop - start for start, stop in self.asked)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 1000 bytes, of which three are kept; pieces of 10 000."""
    monkeypatch.setattr(rows, "BLOCK", 1000)
    monkeypatch.setattr(rows, "KEPT", 3000)
    monkeypatch.setattr(rows, "PIECE_BYTES", 10_000)


def source(height: int, width: int, **more: Any) -> tuple[Tensor, Bytes, rows.Rows]:
    tensor = torch.arange(height * width, dtype=torch.float32).reshape(height, width)
    read = Bytes(tensor, **more)
    return tensor, read, rows.Rows(read, tuple(tensor.shape), tensor.dtype)


@pytest.mark.parametrize("tile", [1, 7, 25, 60, 249])
def test_tiles_in_order_fetch_every_byte_once(blocks, tile) -> None:
    tensor, read, found = source(500, 10)
    for start in range(0, 250, tile):
        assert torch.equal(found[start : min(start + tile, 250)], tensor[start : min(start + tile, 250)])
    assert read.fetched == 250 * 40  # one piece of work, and nothing of the next


def test_a_first_look_fetches_no_more_than_it_asks_for(blocks) -> None:
    _, read, found = source(500, 10)
    assert found[:4].shape == (4, 10)
    assert read.asked == [(0, 160)]


def test_rows_in_any_order_are_right_and_memory_is_bounded(blocks) -> None:
    tensor, _, found = source(500, 10)
    spans = [(0, 30), (30, 60), (10, 50), (400, 500), (59, 61), (60, 90), (90, 91), (0, 500), (499, 500), (3, 3)]
    for start, stop in spans:
        assert torch.equal(found[start:stop], tensor[start:stop])
        assert sum(one.rows.nbytes for one in found._held.values()) <= rows.KEPT + rows.BLOCK


def test_rows_that_were_used_lately_are_not_fetched_again(blocks) -> None:
    _, read, found = source(500, 10)
    for start in range(0, 60, 20):
        found[start : start + 20]
    before = read.fetched
    found[20:40]
    assert read.fetched == before


def test_rows_larger_than_what_is_kept_come_one_by_one(blocks) -> None:
    tensor, read, found = source(4, 2000)
    assert torch.equal(found[1:2], tensor[1:2])
    assert torch.equal(found[1:2], tensor[1:2])
    assert read.fetched == 8000
    assert max(stop - start for start, stop in read.asked) == 1000


def test_rows_that_failed_are_asked_for_again(blocks) -> None:
    tensor, _, found = source(100, 10, failures=1)
    with pytest.raises(InputError, match="no answer"):
        found[0:10]
    assert torch.equal(found[0:10], tensor[0:10])


def test_many_threads_read_rows_of_one_source(blocks) -> None:
    tensor, _, found = source(500, 10)
    spans = [(start, start + 13) for start in range(0, 480, 13)] * 3
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda span: found[span[0] : span[1]], spans))
    assert all(torch.equal(one, tensor[start:stop]) for one, (start, stop) in zip(got, spans, strict=True))


def test_large_tensors_offer_rows_and_small_ones_do_not(large, far) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    with closing(open_checkpoint(f"{far.url}/merged", role="merged")) as opened:
        assert opened.rows("model.norm.weight") is None
        assert opened.read("model.norm.weight").any()
        found = opened.rows(name)
        assert found is not None
        assert (found.shape, found.dtype) == (LARGE, torch.bfloat16)
        assert torch.equal(
            bits(found[2000:2010]), bits(load_file(large / "merged" / "model.safetensors")[name][2000:2010])
        )
    for closed in (name, "model.norm.weight"):
        with pytest.raises(UsageError, match="closed"):
            opened.read(closed)
    with closing(open_checkpoint(large / "merged", role="merged")) as local:
        assert local.rows(name) is None


# --------------------------------------------------------------------------------------------- bad connections


def test_a_dropped_connection_is_taken_up_again(large, far) -> None:
    far.manners.drop_after, far.manners.drops = 9000, 3
    assert report(far.url, jobs=2) == report(str(large))
    assert far.manners.drops == 0


@pytest.mark.parametrize("status", [503, 500, 429])
def test_a_server_in_trouble_is_asked_again(server, status) -> None:
    server.manners.statuses = [status, status]
    opened = open_checkpoint(f"{server.url}/base", role="base")
    server.manners.statuses = [status, status]
    assert opened.read("model.norm.weight").shape == (72,)
    assert server.manners.statuses == []


def test_what_fails_for_good_is_told_with_url_tensor_and_bytes(far) -> None:
    opened = open_checkpoint(f"{far.url}/merged", role="merged")
    far.manners.statuses = [503] * 99
    name = "model.layers.0.self_attn.q_proj.weight"
    says = (
        rf"^merged: tensor '{name}' of {far.url}/merged/model\.safetensors, bytes \d+ to \d+, "
        r"cannot be read after 4 tries: HTTP 503 Service Unavailable$"
    )
    with pytest.raises(InputError, match=says):
        opened.read(name)
    source = opened.rows(name)
    assert source is not None
    with pytest.raises(InputError, match=says):
        source[:9]


def test_a_check_whose_connection_breaks_has_no_verdict(far) -> None:
    far.manners.drop_after, far.manners.drops = MiB, 10**6
    with pytest.raises(
        InputError, match=r"(base|merged): tensor '.+' of http.+, bytes .+ cannot be read after 4 tries"
    ):
        report(far.url)


def test_silence_is_not_waited_for_forever(server, monkeypatch) -> None:
    monkeypatch.setattr(web, "SILENCE", 0.1)
    monkeypatch.setattr(store, "PAUSES", (0.01,))
    opened = open_checkpoint(f"{server.url}/base", role="base")
    server.manners.pause = 0.7
    with pytest.raises(InputError, match="after 2 tries: no answer in time"):
        opened.read("model.norm.weight")
    server.manners.pause = 0.02
    assert opened.read("model.norm.weight").any()


def test_nobody_listens() -> None:
    with serving(DEMO) as gone:
        address = gone.url
    assert "cannot be read after 4 tries" in refused(InputError, f"{address}/base")


def test_a_server_without_ranges_is_refused_and_not_downloaded(far) -> None:
    far.manners.ranges = False
    says = refused(InputError, f"{far.url}/base")
    assert "model.safetensors, bytes 0 to 65535, cannot be read: the server ignores the range" in says
    size = (far.root / "base" / "model.safetensors").stat().st_size
    assert all(one.sent < size for one in far.requests)


def test_ranges_that_are_ignored_later_on_are_not_mistaken(server) -> None:
    opened = open_checkpoint(f"{server.url}/base", role="base")
    server.manners.ranges = False
    with pytest.raises(InputError, match="ignores the range"):
        opened.read("model.norm.weight")


def test_another_range_than_asked_for_is_not_mistaken(server) -> None:
    opened = open_checkpoint(f"{server.url}/base", role="base")
    server.manners.shift = 2
    with pytest.raises(InputError, match=r"the server sends bytes .+ instead"):
        opened.read("model.norm.weight")


def test_a_body_that_falls_short_is_not_mistaken(server) -> None:
    opened = open_checkpoint(f"{server.url}/base", role="base")
    server.manners.short = 4
    with pytest.raises(InputError, match="the body ends after 140 of 144 bytes"):
        opened.read("model.norm.weight")


# ------------------------------------------------------------------------------------------------ changed files


def longer(server: Server) -> None:
    file = server.root / "merged" / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")


def another_tag(server: Server) -> None:
    server.manners.etag = '"b"'


def another_time(server: Server) -> None:
    file = server.root / "merged" / "model.safetensors"
    os.utime(file, (1_000_000, 1_000_000))


def removed(server: Server) -> None:
    (server.root / "merged" / "model.safetensors").unlink()


@pytest.mark.parametrize("change", [longer, another_tag, another_time, removed], ids=lambda one: one.__name__)
def test_of_a_file_that_changes_nothing_is_told(server, change) -> None:
    server.manners.etag, server.manners.dated = '"a"', change is another_time
    opened = open_checkpoint(f"{server.url}/merged", role="merged")
    assert opened.read("model.norm.weight").any()
    change(server)
    with pytest.raises(
        InputError, match=r"^merged: tensor 'model.embed_tokens.weight' of .+ was changed while it was read"
    ):
        opened.read("model.embed_tokens.weight")


# --------------------------------------------------------------------------------------------- what is refused


def test_what_is_not_there(server) -> None:
    assert refused(NotFoundError, f"{server.url}/nothing", "merged").startswith(
        "merged: nothing that is looked for lies"
    )
    assert refused(NotFoundError, f"{server.url}/base/other.safetensors").startswith("base: nothing lies at http")


def test_what_may_not_be_read(server) -> None:
    server.manners.forbidden = ("base/model.safetensors",)
    assert "access is refused: HTTP 403 Forbidden" in refused(InputError, f"{server.url}/base/model.safetensors")
    assert "access is refused" in refused(InputError, f"{server.url}/base")


def test_a_store_that_hides_what_is_absent_is_read_all_the_same(server, world) -> None:
    server.manners.absent = 403
    assert report(server.url) == report(str(world))
    assert "nothing" in refused(NotFoundError, f"{server.url}/nothing")


def test_a_server_that_answers_for_everything_is_no_witness(server) -> None:
    server.manners.absent = 200
    assert "answers for files that are not there" in refused(InputError, f"{server.url}/base")


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("pytorch_model.bin", "is a pickle"),
        ("model.gguf", "is no safetensors file"),
        ("weights.npz", "is no safetensors file"),
    ],
)
def test_other_formats_have_to_be_downloaded(tmp_path, file, says) -> None:
    (tmp_path / file).write_bytes(b"GGUF" * 20)
    with serving(tmp_path) as running:
        for location in (f"{running.url}/{file}", in_memory(tmp_path)):
            with pytest.raises(InputError, match=says):
                open_checkpoint(location, role="base")
        assert not any(one.status == 206 and one.sent > 1 for one in running.requests)


def test_one_checkpoint_for_both_is_refused(server) -> None:
    ours = f"{server.url}/base"
    for theirs in (f"{ours}/", f"{ours}/model.safetensors"):
        with pytest.raises(WrongInputError, match="BASE and MERGED are the same checkpoint"):
            check(ours, f"{server.url}/adapter", theirs)


def test_credentials_are_sent_and_never_shown(server, capsys) -> None:
    server.manners.token = "sig=hush"
    secret = f"http://someone:word@127.0.0.1:{server.server_port}"
    told = [f"{secret}/{name}?sig=hush" for name in ("base", "adapter", "merged")]
    assert main(["report", *told, "--all"]) == 0
    server.manners.statuses = [503] * 99
    assert main(["report", *told]) == 2
    assert main(["report", told[0].replace("hush", "wrong"), *told[1:]]) == 2
    shown = "".join(capsys.readouterr())
    assert "127.0.0.1" in shown
    assert not re.search("hush|word|someone|wrong", shown)


def test_addresses_in_the_messages_of_libraries_are_cleaned() -> None:
    told = "GET 'https://me:word@host/a%20b?sig=hush&x=1', url=http://host/c?token=hush\n(again)"
    assert store.said(OSError(told)) == "GET 'https://host/a%20b', url=http://host/c (again)"
    assert place.shown_as("s3://me:word@host/a?sig=hush#x") == "s3://host/a"
    assert place.shown_as("hf://org/name@main/part") == "hf://org/name@main/part"
    assert place.shown_as("a/local?path") == "a/local?path"


def test_libraries_that_are_missing_are_named(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "lora_check.remote.web")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UsageError, match="https://host/model needs a library that is not installed: aiohttp") as caught:
        open_checkpoint("https://host/model?key=1", role="base")
    assert caught.value.hint == "pip install 'lora_check[remote]'"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense://host/model", "Protocol not known: nonsense"),
        ("zip://a::http://host/b.zip", "chains several stores"),
        ("http://[::1]:1/model", r"cannot be read after 4 tries: Cannot connect to host"),
    ],
)
def test_urls_that_lead_nowhere(url, says) -> None:
    with pytest.raises(LoraCheckError, match=says):
        open_checkpoint(url, role="base")


# ---------------------------------------------------------------------------------------- stores that can be listed


def in_memory(folder: Path) -> str:
    """Copy a folder into fsspec's memory."""
    url = f"memory://{folder}"
    files = fsspec.filesystem("memory")
    for file in folder.rglob("*"):
        if file.is_file():
            files.pipe_file(str(file), file.read_bytes())
    return url


def test_fsspec_stores_and_file_urls(world) -> None:
    assert report(in_memory(world)) == report(str(world)) == report(f"file://{world}", str(world))


@pytest.mark.parametrize("lie", corrupt.HEADERS)
def test_a_lie_in_a_remote_header_is_told_as_in_a_local_one(tmp_path, lie) -> None:
    header, data, _ = corrupt.HEADERS[lie]
    corrupt.write_safetensors(tmp_path / "model.safetensors", header, data)
    with pytest.raises(InputError) as local:
        open_checkpoint(tmp_path, role="base")
    root = in_memory(tmp_path)
    with pytest.raises(type(local.value)) as remote:
        open_checkpoint(root, role="base")
    assert remote.value.message.replace(root, str(tmp_path)) == local.value.message


def test_shards_and_their_index_from_afar(world) -> None:
    tensors = load_file(world / "merged" / "model.safetensors")
    (world / "merged" / "model.safetensors").unlink()
    homes = {name: f"model-0000{1 + (name > 'model.layers')}-of-00002.safetensors" for name in tensors}
    for file in set(homes.values()):
        save_file({name: one for name, one in tensors.items() if homes[name] == file}, world / "merged" / file)
    (world / "merged" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    with serving(world) as running:
        assert report(running.url) == report(in_memory(world)) == report(str(world))
    (world / "merged" / "model-00002-of-00002.safetensors").unlink()
    with serving(world) as running:
        says = refused(CorruptCheckpointError, f"{running.url}/merged")
    assert says.endswith("names shard model-00002-of-00002.safetensors, which is not there")


@pytest.fixture(scope="module")
def bucket(large: Path) -> Iterator[Any]:
    """An S3-compatible server with the world in the bucket `models`, as fsspec sees it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    told = {"endpoint_url": f"http://{host}:{port}", "key": "k", "secret": "hush"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "s3", told)
        files = fsspec.filesystem("s3")
        files.mkdir("models")
        files.put(str(large), "models/world", recursive=True)
        yield files
    server.stop()


def test_buckets_are_read_where_they_lie(bucket, large) -> None:
    assert report("s3://models/world") == report(str(large))
    with closing(open_checkpoint("s3://models/world/merged/model.safetensors", role="merged")) as opened:
        source = opened.rows("model.layers.0.self_attn.q_proj.weight")
        assert source is not None
        assert source[5:9].shape == (4, LARGE[1])


def test_an_object_that_is_overwritten_is_noticed(bucket, large) -> None:
    bucket.put(str(large / "merged" / "model.safetensors"), "models/spoilt/model.safetensors")
    opened = open_checkpoint("s3://models/spoilt", role="merged")
    assert opened.read("model.norm.weight").any()
    somebody_else = fsspec.filesystem("s3", skip_instance_cache=True)
    body = bytearray(somebody_else.cat_file("models/spoilt/model.safetensors"))
    body[-1] ^= 1
    somebody_else.pipe_file("models/spoilt/model.safetensors", bytes(body))
    with pytest.raises(InputError, match="was changed while it was read"):
        opened.read("model.embed_tokens.weight")


def test_a_bucket_that_is_not_there(bucket) -> None:
    assert "nothing lies at s3://models/other" in refused(NotFoundError, "s3://models/other")
    assert "s3://nowhere/model" in refused(NotFoundError, "s3://nowhere/model")


def test_repositories_of_the_hub_are_read_where_they_lie(world) -> None:
    with serving(world, HubHandler) as hub:
        home = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(world / "cache")}
        given = ["hf://org/base", "hf://org/adapter@main", "hf://org/merged"]
        command = [sys.executable, "-m", "lora_check", "report", "--format", "json"]

        def run(*locations: str) -> subprocess.CompletedProcess[str]:
            where = {**os.environ, **home}
            return subprocess.run([*command, *locations], env=where, text=True, capture_output=True, check=False)

        done, absent = run(*given), run("hf://org/other", *given[1:])
        weights = [one for one in hub.requests if one.path.endswith("merged/model.safetensors")]
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["inputs"]["merged"]["location"] == "hf://org/merged"
    assert [one["verdict"] for one in told["tensors"]] == [one["verdict"] for one in report(str(world))["tensors"]]
    assert weights
    assert all(one.status == 206 for one in weights)
    assert not (world / "cache").exists() or not list((world / "cache").rglob("*.safetensors"))
    assert (absent.returncode, "base: nothing lies at hf://org/other" in absent.stderr) == (2, True)

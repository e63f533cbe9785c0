"""Where text goes: reports to stdout or to whole files, progress to a terminal's stderr, and nothing anywhere else."""

from __future__ import annotations

import os
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, Protocol

from lora_check import registry
from lora_check.errors import UsageError
from lora_check.report import Report, Style

TENSOR_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
BESIDE_TENSORS = (
    "*config.json",
    "*.index.json",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.py",
    "merges.txt",
    "tokenizer*",
    "vocab*",
    "README*",
    "LICENSE*",
    "NOTICE*",
)
"""What a model is used with, by name; of other JSON that lies beside its tensors, whatever does not begin as ours."""
OURS, HEAD = (b'{"schema":', b'{"kind":"lora_checkjournal"'), 64
"""How JSON that this package wrote begins, without its white space, and how many bytes are looked at for that."""

Advance = Callable[[int], None]


class Progress(Protocol):
    """(total, what is being done, unit) -> a bar; it is told how many of the total are done as they come."""

    def __call__(self, total: int, deed: str = ..., unit: str = ..., /) -> AbstractContextManager[Advance]: ...


def say(text: str) -> None:
    """Write to stdout, now: a closed pipe or a full disk is noticed here and not at exit."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(sys.stdout)
        raise UsageError(f"could not write to stdout: {_reason(error)}", hint="make room where stdout goes") from error


def complain(text: str) -> None:
    """Write to stderr, now; where nobody can be told, the exit code alone does it."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        silence(sys.stderr)


def silence(stream: IO[str]) -> None:
    """Let what a stream still holds go nowhere: its flush at exit must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def printable(text: str) -> str:
    """The text on one line, with every character that could move a cursor written as its escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# ---------------------------------------------------------------------------------------------------- options


def add_options(parser: ArgumentParser) -> None:
    """--format, --output, --all, and a file option for every renderer but text."""
    names = tuple(registry.load("renderers"))
    parser.add_argument("--format", choices=names, default="text", help="what goes to stdout; text by default")
    parser.add_argument("--output", metavar="FILE", help="write that to FILE and nothing to stdout")
    for name in _with_files():
        parser.add_argument(f"--{name}", metavar="FILE", help=f"also write the report as {name} to FILE")
    parser.add_argument("--all", action="store_true", help="every tensor and every finding, not one screen")


def add_json(parser: ArgumentParser) -> None:
    """--json for a command whose outcome is not a report."""
    parser.add_argument("--json", metavar="FILE", help="also write the outcome as json to FILE")


def _with_files() -> list[str]:
    return [name for name in registry.load("renderers") if name != "text"]


# ----------------------------------------------------------------------------------------------------- reports


def prepare(args: Namespace) -> None:
    """Refuse, before anything is read, files that could not be written or that would replace an input."""
    files = _files(args)
    for file in files:
        demand_writable(file, args.locations)
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise UsageError(f"two outputs go to one file: {', '.join(files)}", hint="give each output its own file")


def _files(args: Namespace) -> list[str]:
    wanted = [getattr(args, name, None) for name in ("output", *_with_files())]
    return [file for file in wanted if file is not None]


def demand_writable(file: str, inputs: Iterable[str]) -> None:
    """Raise UsageError where writing this file would fail, or would destroy what is being checked."""
    path = Path(file)
    if path.is_dir() or not path.parent.is_dir():
        reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UsageError(f"could not write {file}: {reason}", hint="name a file in an existing folder")
    known = [os.path.realpath(one) for one in inputs]
    if path.suffix in TENSOR_FILES or os.path.realpath(file) in known:
        raise UsageError(f"could not write {file}: that would replace tensors", hint="name another file")
    places = (Path(os.path.realpath(file)), Path(os.path.realpath(path.parent), path.name))  # a link, and its target
    if any(_is_beside(place, Path(one)) and _is_theirs(place) for place in places for one in known):
        raise UsageError(f"could not write {file}: that would replace a file of the model", hint="name another file")


def _is_beside(place: Path, given: Path) -> bool:
    """Whether a file lies in the folder of an input."""
    return os.path.exists(given) and place.is_relative_to(given if given.is_dir() else given.parent)


def _is_theirs(place: Path) -> bool:
    """Whether a file is one that a model is used with, so that no report may stand in its place."""
    if any(fnmatchcase(place.name, pattern) for pattern in BESIDE_TENSORS):
        return True
    if place.suffix != ".json" or not place.is_file():
        return False
    try:
        with place.open("rb") as file:
            return not b"".join(file.read(HEAD).split()).startswith(OURS)
    except OSError:  # nobody knows what it is
        return True


def deliver(report: Report, args: Namespace) -> int:
    """Write the files, then stdout; the exit code of the report."""
    for name in _with_files():
        if (file := getattr(args, name)) is not None:
            write(file, render(report, name, Style(all=args.all)))
    if args.output is not None:
        write(args.output, render(report, args.format, Style(all=args.all)))
    else:
        say(render(report, args.format, terminal_style(every=args.all)))
    return report.exit_code


def render(report: Report, name: str, style: Style) -> str:
    """The report as the renderer of that name has it."""
    text: str = registry.load("renderers")[name].render(report, style)
    return text


def terminal_style(*, every: bool = False) -> Style:
    """Colour and width of stdout."""
    if not sys.stdout.isatty():
        return Style(all=every)
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return Style(all=every, colour=not plain, width=shutil.get_terminal_size((100, 24)).columns)


# ------------------------------------------------------------------------------------------------------- files


def write(file: str, text: str) -> None:
    """Write a file whole: it holds either what it held before or all of the text."""
    try:
        _write_whole(Path(os.path.realpath(file)), text)
    except OSError as error:
        hint = "name a file in an existing folder"
        raise UsageError(f"could not write {file}: {_reason(error)}", hint=hint) from error


def _write_whole(path: Path, text: str) -> None:
    data = text.encode("utf-8", errors="backslashreplace")
    if path.exists() and not path.is_file():  # a device or a pipe has nothing to be replaced
        path.write_bytes(data)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink()


# ---------------------------------------------------------------------------------------------------- progress


INTERVAL, SMOOTHING = 0.5, 0.1
"""Seconds between two looks of a bar, and the weight of the last of them: its rate and the time that is left are
those of the last five seconds or so, not of a start that read from another place."""


def progress() -> Progress | None:
    """A bar on stderr when someone watches it."""
    return _bar if sys.stderr.isatty() else None


@contextmanager
def _bar(total: int, deed: str = "comparing", unit: str = "B", /) -> Iterator[Advance]:
    from tqdm import tqdm

    bar: Any
    with tqdm(
        total=total,
        desc=deed,
        unit=unit,
        unit_scale=unit == "B",
        smoothing=SMOOTHING,
        mininterval=INTERVAL,
        miniters=1,  # tensors differ in size: a bar that waits for as many bytes as before would stand still
        dynamic_ncols=True,
        leave=False,
        file=sys.stderr,
    ) as bar:
        yield bar.update

"""A plug-in is one file with one constant: what the registry takes, what it refuses, and that the manual has it all."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from lora_check import registry
from lora_check.__main__ import main
from lora_check.errors import LoraCheckError, RegistryError

PACKAGE = Path(registry.__file__).parent
CODES = sorted(registry.load("faults"))


def modules_of(folder: str) -> list[str]:
    return sorted(path.stem for path in (PACKAGE / folder).glob("*.py") if not path.name.startswith("_"))


@pytest.mark.parametrize("folder", registry.CONSTANTS)
def test_every_file_of_a_folder_is_one_plugin(folder: str) -> None:
    constant = registry.CONSTANTS[folder]
    modules = [importlib.import_module(f"lora_check.{folder}.{name}") for name in modules_of(folder)]
    entries = [getattr(one, constant) for one in modules]
    assert sorted(registry.load(folder)) == sorted(getattr(one, "code", None) or one.name for one in entries)
    assert len(entries) == len(registry.load(folder)) > 0


@pytest.mark.parametrize("folder", registry.CONSTANTS)
def test_every_plugin_has_a_docstring(folder: str) -> None:
    for key in registry.load(folder):
        assert registry.page(folder, key)


def test_the_mapping_is_read_only_and_in_the_order_of_the_files() -> None:
    faults = registry.load("faults")
    assert list(faults) == CODES
    with pytest.raises(TypeError):
        faults["LC999"] = faults["LC101"]  # type: ignore[index]


def test_an_unknown_key_has_no_page() -> None:
    with pytest.raises(RegistryError, match="LC999"):
        registry.page("faults", "LC999")


# -------------------------------------------------------------------------------------------- a package of our own

Build = Callable[[Mapping[str, str]], str]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """(file -> source) -> the name of a new package whose folder `faults` holds these files."""
    made: list[str] = []

    def build(files: Mapping[str, str]) -> str:
        name = f"plugins_{len(made)}_{tmp_path.name}".replace("-", "_")
        made.append(name)
        folder = tmp_path / name / "faults"
        folder.mkdir(parents=True)
        for file in (tmp_path / name / "__init__.py", folder / "__init__.py"):
            file.write_text("")
        for file, source in files.items():
            (folder / f"{file}.py").write_text(source)
        importlib.invalidate_caches()
        return name

    monkeypatch.syspath_prepend(tmp_path)
    yield build
    for name in [key for key in sys.modules if key.split(".")[0] in made]:
        del sys.modules[name]


def plugin(code: str, name: str = "a-name") -> str:
    return f"from types import SimpleNamespace\nFAULT = SimpleNamespace(code={code!r}, name={name!r})\n"


def test_files_are_taken_in_name_order_and_helpers_are_left_alone(package: Build) -> None:
    name = package({"b": plugin("LC1"), "a": plugin("LC2"), "_helper": "raise RuntimeError", "c": plugin("LC0")})
    assert list(registry.load("faults", name)) == ["LC2", "LC1", "LC0"]


def test_a_plugin_without_a_code_goes_by_its_name(package: Build) -> None:
    name = package({"a": "from types import SimpleNamespace\nFAULT = SimpleNamespace(name='plain')\n"})
    assert list(registry.load("faults", name)) == ["plain"]


def test_an_empty_folder_is_an_empty_mapping(package: Build) -> None:
    assert dict(registry.load("faults", package({}))) == {}


def test_two_files_with_one_key_are_refused_by_name(package: Build) -> None:
    name = package({"first": plugin("LC1"), "middle": plugin("LC2"), "second": plugin("LC1")})
    with pytest.raises(RegistryError) as caught:
        registry.load("faults", name)
    for word in (f"{name}.faults.first", f"{name}.faults.second", "LC1"):
        assert word in caught.value.message
    assert caught.value.hint
    assert "middle" not in caught.value.message


@pytest.mark.parametrize("source", ["", "OTHER = 1\n", "FAULT = None\n", "fault = 1\n"])
def test_a_file_without_its_constant_is_refused_by_name(package: Build, source: str) -> None:
    name = package({"good": plugin("LC1"), "lacking": source})
    with pytest.raises(RegistryError) as caught:
        registry.load("faults", name)
    assert f"{name}.faults.lacking" in caught.value.message
    assert "FAULT" in caught.value.message
    assert isinstance(caught.value, LoraCheckError)


def test_a_refusal_is_not_remembered_as_an_answer(package: Build) -> None:
    name = package({"lacking": ""})
    for _ in range(2):
        with pytest.raises(RegistryError):
            registry.load("faults", name)


# ------------------------------------------------------------------------------------------------------ the manual


def test_every_code_is_unique_and_so_is_every_name() -> None:
    names = [fault.name for fault in registry.load("faults").values()]
    assert len(set(names)) == len(names) == len(CODES) == len(modules_of("faults"))


def test_rules_lists_every_code_with_its_name_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules"]) == 0
    words = capsys.readouterr().out.split()
    for code, fault in registry.load("faults").items():
        assert words.count(code) == 1
        assert fault.name in words


@pytest.mark.parametrize("code", CODES)
def test_explain_prints_the_page_of_every_code(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", code]) == 0
    out = capsys.readouterr().out
    assert registry.load("faults")[code].name in out
    assert "What to do" in out


@pytest.mark.parametrize("name", list(registry.load("commands")))
def test_every_command_is_documented(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = registry.load("commands")[name]
    assert command.summary
    assert "\n" not in command.summary
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert f"    {name}" in listed
    assert main([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert " ".join(command.summary.split()[:3]) in " ".join(told.split())
    assert f"exit codes: {command.exits or '0 verified, 1 refuted'}" in " ".join(told.split())


@pytest.mark.parametrize("name", list(registry.load("commands")))
def test_every_argument_of_a_command_has_a_help_text(name: str) -> None:
    from lora_check.commands import _parser

    parser = _parser.build()
    (commands,) = (action for action in parser._actions if action.dest == "command")
    inner = commands.choices[name]
    assert [action.dest for action in inner._actions if not action.help] == []

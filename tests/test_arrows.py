"""The arrows that must never be: who imports whom is read from the source, wherever the statement stands."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "lora_check"
FOLDERS = (
    "combinations",
    "commands",
    "dialects",
    "engines",
    "faults",
    "formats",
    "layouts",
    "quantisations",
    "recipes",
    "renderers",
)
"""Folders of plug-ins; one that is not there yet has no arrows."""

LINE = ("registry", "pipeline", "compare", "diagnose", "findings", "work")
LIBRARIES_OF_PRODUCERS = ("peft", "transformers")
TABLE_OF_NAMES = "lora_check/layouts/_transformers_table.py"
MAY_IMPORT_PRODUCERS = (f"{PACKAGE}/oracles/", "benchmarks/", "fixtures/", "tests/")


@dataclass(frozen=True)
class Module:
    """One source file: its path from the root, its dotted name, its tree."""

    path: str
    name: str
    tree: ast.Module

    @property
    def folder(self) -> str:
        """The folder of plug-ins that it lies in, if any; a folder's own __init__ is no plug-in."""
        parts = self.path.split("/")
        inside = len(parts) == 3 and parts[0] == PACKAGE and parts[2] != "__init__.py"
        return parts[1] if inside and parts[1] in FOLDERS else ""

    @property
    def is_plugin(self) -> bool:
        return bool(self.folder) and not self.name.rsplit(".", 1)[-1].startswith("_")


def module(path: str, source: str) -> Module:
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return Module(path, name, ast.parse(source))


def read(*places: str) -> list[Module]:
    files = [file for place in places for file in sorted((ROOT / place).rglob("*.py"))]
    return [module(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]


def imports(one: Module, known: Iterable[str] = (), *, at_runtime: bool = False) -> set[str]:
    """Dotted names that a module imports, at its top or in a function; `from a import b` is a.b where that is a module.

    at_runtime   leave out what stands under `if TYPE_CHECKING`
    """
    known, found = set(known), set()
    for node in _nodes(one.tree, at_runtime=at_runtime):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = _home(one, node)
            found |= {f"{home}.{alias.name}" if f"{home}.{alias.name}" in known else home for alias in node.names}
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            words = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            found |= {word for word in words if isinstance(word, str)}
    return found


def _nodes(tree: ast.AST, *, at_runtime: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if at_runtime and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _nodes(node, at_runtime=at_runtime)


def _home(one: Module, node: ast.ImportFrom) -> str:
    """The absolute name of what stands after `from`."""
    if not node.level:
        return node.module or ""
    parts = one.name.split(".")
    package = parts if one.path.endswith("__init__.py") else parts[:-1]
    start = package[: len(package) - node.level + 1]
    return ".".join([*start, *([node.module] if node.module else [])])


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def ours(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == PACKAGE}


def libraries(names: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


# ------------------------------------------------------------------------------------- rules: modules -> offences

Offences = list[str]


def plugins_apart(modules: list[Module]) -> Offences:
    """A plug-in imports no plug-in and no other folder's helpers; the helpers of a folder import no plug-in either."""
    known = {one.name: one for one in modules}
    found = []
    for one in modules:
        for name in ours(imports(one, known)) if one.folder else ():
            other = known.get(name)
            if other and other.folder and other is not one and (other.is_plugin or other.folder != one.folder):
                found.append(f"{one.path} -> {name}")
    return found


def plugins_below_the_line(modules: list[Module]) -> Offences:
    """A plug-in that is no command knows nothing of the line that uses it."""
    known = {one.name for one in modules}
    line = {f"{PACKAGE}.{name}" for name in LINE}
    return [
        f"{one.path} -> {name}"
        for one in modules
        if one.folder and one.folder != "commands"
        for name in imports(one, known)
        if name in line
    ]


def planning_without_data(modules: list[Module]) -> Offences:
    """plan and sites import no tensor library and call no `read`."""
    planners = [one for one in modules if one.name in (f"{PACKAGE}.plan", f"{PACKAGE}.sites")]
    calls = [
        f"{one.path} line {node.lineno} reads"
        for one in planners
        for node in ast.walk(one.tree)
        if isinstance(node, ast.Attribute | ast.Name) and getattr(node, "attr", getattr(node, "id", "")) == "read"
    ]
    loads = [
        f"{one.path} -> {name}"
        for one in planners
        for name in libraries(imports(one)) & {"torch", "numpy", "safetensors"}
    ]
    return calls + loads


def nouns_alone(modules: list[Module]) -> Offences:
    """types and errors import nothing of ours."""
    known = {one.name for one in modules}
    alone = [one for one in modules if one.name in (f"{PACKAGE}.types", f"{PACKAGE}.errors")]
    return [f"{one.path} -> {name}" for one in alone for name in ours(imports(one, known))]


def producers_apart(modules: list[Module]) -> Offences:
    """peft and transformers are imported where live producers live; transformers' own table of names, by one layout."""
    return [
        f"{one.path} -> {name}"
        for one in modules
        if not one.path.startswith(MAY_IMPORT_PRODUCERS)
        for name in libraries(imports(one)) & set(LIBRARIES_OF_PRODUCERS)
        if (one.path, name) != (TABLE_OF_NAMES, "transformers")
    ]


def renderers_only_return(modules: list[Module]) -> Offences:
    """A renderer neither prints, nor opens, nor touches sys or files."""
    found = []
    for one in modules:
        if one.folder != "renderers":
            continue
        doors = {"sys", "os", "pathlib", "io", "subprocess", "shutil", "tempfile", "logging"}
        found += [f"{one.path} -> {name}" for name in libraries(imports(one)) & doors]
        for node in ast.walk(one.tree):
            word = getattr(node, "id", getattr(node, "attr", "")) if isinstance(node, ast.Name | ast.Attribute) else ""
            if word in ("print", "open", "stdout", "stderr", "write_text", "write_bytes"):
                found.append(f"{one.path} line {node.lineno}: {word}")
    return found


def oracle_alone(modules: list[Module]) -> Offences:
    """tests/oracle.py and tests/oracle_tuners share no code with what they judge."""
    return [
        f"{one.path} -> {name}"
        for one in modules
        if one.path == "tests/oracle.py" or one.path.startswith("tests/oracle_tuners/")
        for name in imports(one)
        if name.split(".")[0] == PACKAGE or name.startswith(".") or not name
    ]


def no_cycle(modules: list[Module]) -> Offences:
    """No module imports itself in the end, lazily or not; what only a type checker sees is no import."""
    inside = [one for one in modules if one.name.split(".")[0] == PACKAGE]
    known = {one.name for one in inside}
    arrows = {one.name: (imports(one, known, at_runtime=True) & known) - {one.name} for one in inside}
    cycles: dict[frozenset[str], str] = {}
    for start in arrows:
        _walk([start], arrows, cycles, set())
    return list(cycles.values())


def _walk(path: list[str], arrows: Mapping[str, set[str]], cycles: dict[frozenset[str], str], done: set[str]) -> None:
    for name in sorted(arrows[path[-1]]):
        if name == path[0]:
            cycles.setdefault(frozenset(path), " -> ".join([*path, name]))
        elif name not in done:
            done.add(name)
            _walk([*path, name], arrows, cycles, done)


RULES = (
    plugins_apart,
    plugins_below_the_line,
    planning_without_data,
    nouns_alone,
    producers_apart,
    renderers_only_return,
    oracle_alone,
    no_cycle,
)


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return read(PACKAGE, "tests", "benchmarks", "fixtures")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_arrow_points_the_wrong_way(modules, rule) -> None:
    assert rule(modules) == []


# ---------------------------------------------------------------------------------------------- negative controls

FAULT, OTHER = f"{PACKAGE}/faults/lc901_new.py", f"{PACKAGE}/faults/lc101_old.py"
PRIVATE = f"{PACKAGE}/faults/_shared.py"
TEXT = f"{PACKAGE}/renderers/text.py"

OFFENCES = {
    "a plug-in of its own folder": (plugins_apart, FAULT, "from lora_check.faults.lc101_old import FAULT"),
    "the same, relative": (plugins_apart, FAULT, "from .lc101_old import FAULT"),
    "the same, as a module": (plugins_apart, FAULT, "from lora_check.faults import lc101_old"),
    "the same, from the package": (plugins_apart, FAULT, "import lora_check.faults.lc101_old as old"),
    "the same, lazily": (plugins_apart, FAULT, "def f():\n    from . import lc101_old"),
    "the same, by name": (plugins_apart, FAULT, "m = import_module('lora_check.faults.lc101_old')"),
    "another folder": (plugins_apart, FAULT, "from lora_check.renderers import text"),
    "another folder's helper": (plugins_apart, TEXT, "from lora_check.faults import _shared"),
    "a helper that imports a plug-in": (plugins_apart, PRIVATE, "from lora_check.faults import lc101_old"),
    "a command that imports a command": (plugins_apart, f"{PACKAGE}/commands/a.py", "from . import b"),
    "a fault that asks the registry": (plugins_below_the_line, FAULT, "from lora_check import registry"),
    "a fault that compares": (plugins_below_the_line, FAULT, "def f():\n    from lora_check.compare import compare"),
    "a helper that runs the line": (plugins_below_the_line, PRIVATE, "import lora_check.pipeline"),
    "a renderer that diagnoses": (plugins_below_the_line, TEXT, "from ..diagnose import faults"),
    "a plan that imports torch": (planning_without_data, f"{PACKAGE}/plan.py", "def f():\n    import torch"),
    "a plan that reads": (planning_without_data, f"{PACKAGE}/plan.py", "x = base.read('w')"),
    "a plan that maps reading": (planning_without_data, f"{PACKAGE}/sites.py", "x = list(map(base.read, names))"),
    "types that import errors": (nouns_alone, f"{PACKAGE}/types.py", "from lora_check.errors import InputError"),
    "errors that import types": (nouns_alone, f"{PACKAGE}/errors.py", "def f():\n    from . import types"),
    "peft in a recipe": (producers_apart, f"{PACKAGE}/recipes/x.py", "def f():\n    from peft.tuners import lora"),
    "peft beside transformers' table": (producers_apart, f"{PACKAGE}/layouts/_transformers_table.py", "import peft"),
    "an oracle of a tuner that asks the package": (
        oracle_alone,
        "tests/oracle_tuners/additive.py",
        "from lora_check import recipes",
    ),
    "transformers in the line": (producers_apart, f"{PACKAGE}/pipeline.py", "import transformers.utils as u"),
    "peft by name": (producers_apart, f"{PACKAGE}/pipeline.py", "importlib.import_module('peft')"),
    "a renderer that prints": (renderers_only_return, TEXT, "def f():\n    print('x')"),
    "a renderer that opens": (renderers_only_return, TEXT, "def f():\n    return open('x')"),
    "a renderer that opens a path": (renderers_only_return, TEXT, "from pathlib import Path"),
    "a renderer that touches sys": (renderers_only_return, f"{PACKAGE}/renderers/_words.py", "import sys"),
    "a renderer that asks the environment": (renderers_only_return, TEXT, "from os import environ"),
    "an oracle that asks the package": (oracle_alone, "tests/oracle.py", "from lora_check.rounding import store"),
    "an oracle that asks it lazily": (oracle_alone, "tests/oracle.py", "def f():\n    import lora_check.ball"),
    "a cycle": (no_cycle, f"{PACKAGE}/plan.py", "from lora_check import pipeline"),
    "a lazy cycle": (no_cycle, f"{PACKAGE}/plan.py", "def f():\n    from lora_check.pipeline import check"),
    "a cycle of two": (no_cycle, f"{PACKAGE}/sites.py", "def f():\n    import lora_check.pipeline"),
}
INNOCENT = {
    FAULT: "from lora_check.faults._shared import found\nfrom lora_check.types import ValueFault\n",
    OTHER: "def f():\n    from lora_check.rounding import FORMATS\n",
    PRIVATE: "from lora_check.types import Finding\n",
    TEXT: "from lora_check.report import Report\nfrom lora_check.renderers._words import plain\n",
    f"{PACKAGE}/renderers/_words.py": "import re\n",
    f"{PACKAGE}/renderers/__init__.py": "",
    f"{PACKAGE}/commands/a.py": "def run():\n    from lora_check.pipeline import check\n    print(open('x'))\n",
    f"{PACKAGE}/commands/b.py": "from lora_check import registry\nfrom lora_check.commands import _c\n",
    f"{PACKAGE}/commands/_c.py": "import sys\n",
    f"{PACKAGE}/recipes/x.py": "from lora_check.types import Recipe\n",
    f"{PACKAGE}/oracles/peft.py": "def f():\n    import peft, transformers\n",
    f"{PACKAGE}/layouts/_transformers_table.py": "def f():\n    import transformers\n",
    "tests/oracle_tuners/additive.py": "import oracle\nimport numpy as np\n",
    f"{PACKAGE}/types.py": "from __future__ import annotations\nimport math\n",
    f"{PACKAGE}/errors.py": "",
    f"{PACKAGE}/report.py": "from lora_check.types import Finding\n",
    f"{PACKAGE}/rounding.py": "import torch\nfrom lora_check.types import Arithmetic\n",
    f"{PACKAGE}/compare.py": "from lora_check import rounding\n",
    f"{PACKAGE}/diagnose.py": "from lora_check.compare import compare\n",
    f"{PACKAGE}/registry.py": "from lora_check.errors import RegistryError\n",
    f"{PACKAGE}/sites.py": "from lora_check.types import Site\n",
    f"{PACKAGE}/plan.py": "from lora_check import registry\nfrom lora_check.sites import gather\n",
    f"{PACKAGE}/pipeline.py": (
        "from typing import TYPE_CHECKING\nfrom lora_check import diagnose\nfrom lora_check.plan import make_plan\n"
    ),
    f"{PACKAGE}/__init__.py": "def check():\n    from lora_check import pipeline\n",
    "tests/oracle.py": "import numpy\n",
    "tests/test_x.py": "import peft, lora_check\n",
    "benchmarks/x.py": "import transformers\n",
}


def synthetic(path: str = "", source: str = "") -> list[Module]:
    """A small package without an offence, and one module of it with a line more."""
    return [module(name, text + (source if name == path else "")) for name, text in INNOCENT.items()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_package_without_an_offence_passes_every_rule(rule) -> None:
    assert rule(synthetic()) == []


@pytest.mark.parametrize("case", OFFENCES)
def test_each_offence_is_seen_by_its_rule(case) -> None:
    rule, path, source = OFFENCES[case]
    assert path in INNOCENT
    assert rule(synthetic(path, source)) != []


def test_a_cycle_that_only_a_type_checker_sees_is_none() -> None:
    source = "if TYPE_CHECKING:\n    from lora_check import pipeline\n"
    assert no_cycle(synthetic(f"{PACKAGE}/plan.py", source)) == []
    assert no_cycle(synthetic(f"{PACKAGE}/plan.py", source.replace("TYPE_CHECKING", "True"))) != []


def test_the_rules_read_the_package_that_is_there(modules) -> None:
    names = {one.name for one in modules}
    assert {f"{PACKAGE}.{name}" for name in ("types", "errors", "plan", "sites", "pipeline", "registry")} <= names
    assert {f"{PACKAGE}.{name}" for name in LINE} <= names
    assert "tests.oracle" in names
    assert len([one for one in modules if one.is_plugin]) > 50
    assert {one.folder for one in modules if one.folder} <= set(FOLDERS)


def test_every_folder_of_plugins_is_under_the_rules() -> None:
    from lora_check.registry import CONSTANTS

    assert set(CONSTANTS) <= set(FOLDERS)

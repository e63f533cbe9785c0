"""Hold the package to what it may import: importing a library can cost more than checking a model."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_check"
DEMO = PACKAGE / "data" / "demo"
HEAVY = ("torch", "transformers", "peft", "numpy")
PROBE = """
import json, sys
from lora_check.__main__ import main
code = main(sys.argv[2:])
loaded = [name for name in json.loads(sys.argv[1]) if name in sys.modules]
sys.stderr.write(json.dumps({"code": code, "loaded": loaded}))
"""


def loaded_by(*argv: str) -> dict[str, object]:
    """The exit code of a command in a fresh process, and which heavy libraries it imported."""
    command = [sys.executable, "-c", PROBE, json.dumps(HEAVY), *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    answer: dict[str, object] = json.loads(done.stderr.splitlines()[-1])
    return answer


@pytest.mark.parametrize("argv", [["--help"], ["report", "--help"], ["rules"], ["explain", "LC102"]])
def test_what_needs_no_tensor_imports_no_library(argv: Sequence[str]) -> None:
    assert loaded_by(*argv) == {"code": 0, "loaded": []}


def test_a_report_imports_torch_and_neither_transformers_nor_peft() -> None:
    answer = loaded_by("report", *(str(DEMO / name) for name in ("base", "adapter", "merged")))
    assert answer["code"] == 0
    assert "torch" in answer["loaded"]
    assert not {"transformers", "peft"}.intersection(answer["loaded"])


def test_importing_the_package_imports_no_library() -> None:
    probe = "import sys, lora_check; sys.exit(any(name in sys.modules for name in {!r}))"
    assert subprocess.run([sys.executable, "-c", probe.format(HEAVY)], cwd=ROOT, check=False).returncode == 0
    spoilt = f"import torch; {probe.format(HEAVY)}"
    assert subprocess.run([sys.executable, "-c", spoilt], cwd=ROOT, check=False).returncode == 1


def libraries_of(source: str) -> set[str]:
    """The top-level names that a source imports, wherever the statement stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def test_only_the_oracles_import_peft_and_only_one_layout_asks_transformers() -> None:
    files = {str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py")}
    users = {
        library: {name for name, source in files.items() if library in libraries_of(source)}
        for library in ("peft", "transformers")
    }
    outside = {library: {name for name in names if not name.startswith("oracles/")} for library, names in users.items()}
    assert all(users.values())
    assert outside == {"peft": set(), "transformers": {"layouts/_transformers_table.py"}}


def test_an_import_inside_a_function_would_be_seen() -> None:
    assert libraries_of("def f():\n    from peft.tuners import lora\n") == {"peft"}
    assert libraries_of("from . import peft\nname = 'peft'") == set()

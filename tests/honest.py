"""Print docs/honest.md: honest merges of every recipe, dtype, order of operations, size of the delta and layout.

PYTHONPATH=. python tests/honest.py > docs/honest.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import confusion_worlds as models
import layout_worlds
import test_budget as producers
import torch
import tuner_worlds
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from torch import Tensor

import lora_check
from lora_check.compare import compare
from lora_check.rounding import arithmetics

SIZES = models.SIZES
WORDS = ("exact", "budget", "undecided", "ACCUSED", "REFUTED")
REGIMES = (("bf16", False), ("bf16", True), ("fp32", False), ("fp32", True))
HEAD = """# Honest merges

Merges that are right, by producers that share nothing with the code that judges them. A right merge that is refuted is
a bug, and so is one with a finding of error severity: the last two columns must be empty. With torch {torch} and PEFT
{peft}, on one core of a CPU.

- **exact**: every target bit for bit
- **budget**: every target within its derived budget, and not all of them bit for bit
- **undecided**: nothing is refuted, and something could not be verified: most often a delta that the dtype cannot hold
- **ACCUSED**: not refuted, and a finding calls it an error
- **REFUTED**: called wrong

Made by `PYTHONPATH=. python tests/honest.py > docs/honest.md`.
"""


class Case(NamedTuple):
    """One honest merge: the part of the matrix it belongs to, what it is, and what it was called."""

    part: str
    row: str
    size: float
    word: str
    line: str


def called(report: lora_check.Report) -> str:
    """What the report of an honest merge comes to."""
    targets = [one for one in report.comparisons if one.kind != "bystander"]
    if report.exit_code != 1 and any(one.severity == "error" for one in report.findings):
        return "ACCUSED"
    return {
        "verified": "exact" if all(one.exact for one in targets) else "budget",
        "inconclusive": "undecided",
        "refuted": "REFUTED",
    }[report.verdict.value]


# ------------------------------------------------------------------------------------------ orders of operations


def orders() -> Iterator[Case]:
    """Single tensors by whole-tensor scripts: each kind of layer in each order, at each pair of dtypes and size."""
    for (index, (name, storage, base, how)), size in itertools.product(enumerate(producers.COMBINATIONS), SIZES):
        if storage != base and (index + SIZES.index(size)) % 2:
            continue  # half of the sizes, in turn: the orders at the base's dtype are the same code
        world = producers.make(name, base, size, seed=SIZES.index(size))
        case, known = world.case(storage), arithmetics(storage, base)
        for style, producer in producers.styles_of(how).items():
            actual = producers.merged(world, producer, storage, producers.model_of(how, storage, base))
            seen = compare(case, actual, known)
            word = "exact" if seen.exact else "budget"
            word = "REFUTED" if not seen.fits else "undecided" if seen.vanished or seen.blurred else word
            line = f"{name} {storage} over {base} {how.name} {style} {size:g}"
            yield Case("orders", name, size, word, line)


# --------------------------------------------------------------------------------------------- models and layouts


def whole(tensors: dict[str, Tensor], folder: Path, config: Mapping[str, object]) -> Path:
    """One file."""
    return shards(tensors, folder, config, count=1)


def sharded(tensors: dict[str, Tensor], folder: Path, config: Mapping[str, object]) -> Path:
    """Three shards and their index."""
    return shards(tensors, folder, config, count=3)


def shards(tensors: dict[str, Tensor], folder: Path, config: Mapping[str, object], count: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(config)))
    if count == 1:
        save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors")
        return folder
    place = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(place.values()):
        save_file({name: one.contiguous() for name, one in tensors.items() if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def fused(tensors: dict[str, Tensor], folder: Path, config: Mapping[str, object]) -> Path:
    """Query, key and value, and gate and up, each in one tensor."""
    found = dict(tensors)
    for parts, name in ((("q_proj", "k_proj", "v_proj"), "qkv_proj"), (("gate_proj", "up_proj"), "gate_up_proj")):
        for first in [one for one in tensors if f".{parts[0]}." in one]:
            rows = [found.pop(first.replace(parts[0], part)) for part in parts]
            found[first.replace(parts[0], name)] = torch.cat(rows)
    return whole(found, folder, config)


Save = Callable[[dict[str, Tensor], Path, Mapping[str, object]], Path]
LAYOUTS: Mapping[str, tuple[Save, Save]] = {
    "one file": (whole, whole),
    "shards": (sharded, sharded),
    "sharded by the merge": (whole, sharded),
    "fused by the merge": (whole, fused),
    "split by the merge": (fused, whole),
    "fused": (fused, fused),
}
FUSABLE = ("linear", "mlp", "rslora", "patterns", "dora-linear", "two", "vera", "loha")


def whole_models(root: Path) -> Iterator[Case]:
    """Models of eight targets by whole-tensor scripts, in each layout of their files that fits them."""
    for index, (world, dtype, size) in enumerate(itertools.product(models.WORLDS, models.DTYPES, SIZES)):
        model = models.make(world, dtype, size, seed=index)
        home = root / f"{world}-{dtype}-{size:g}"
        _, adapters = model.save(home)
        before = {one.name: one.base for one in model.targets} | dict(model.bystanders)
        for layout, (save_base, save_merged) in LAYOUTS.items():
            if "fused" in (save_base.__name__, save_merged.__name__) and world not in FUSABLE:
                continue
            base = save_base(before, home / f"base {layout}", model.config)
            for safe in (False, True):
                after = {one.name: models.merge(one, safe) for one in model.targets} | dict(model.bystanders)
                merged = save_merged(after, home / f"merged {layout} {safe}", model.config)
                report = lora_check.check(base, adapters, merged, jobs=1, weights=model.weights)
                line = f"{world} {layout} {dtype} {size:g} {'safe' if safe else 'plain'}"
                yield Case("models", f"{world}, {layout}", size, called(report), line)


def tied(root: Path) -> Iterator[Case]:
    """A head that is the embedding, kept in one tensor or in two, under an adapter of the other targets."""
    for dtype, size, (layout, twice) in itertools.product(
        models.DTYPES, SIZES, {"in one tensor": (False, False), "written twice": (False, True)}.items()
    ):
        model = models.make("linear", dtype, size, seed=3)
        home, config = root / f"tied-{dtype}-{size:g}-{layout}", {**model.config, "tie_word_embeddings": True}
        _, adapters = model.save(home)
        table = models.randn((64, 320), torch.Generator().manual_seed(1), 0.02).to(models.DTYPES[dtype])
        heads = [
            {"model.embed_tokens.weight": table} | ({"lm_head.weight": table.clone()} if one else {}) for one in twice
        ]
        before = {one.name: one.base for one in model.targets} | dict(model.bystanders) | heads[0]
        after = {one.name: models.merge(one) for one in model.targets} | dict(model.bystanders) | heads[1]
        base, merged = whole(before, home / "before", config), whole(after, home / "after", config)
        report = lora_check.check(base, adapters, merged, jobs=1)
        yield Case("models", f"tied head, {layout}", size, called(report), f"tied {layout} {dtype} {size:g}")


# ----------------------------------------------------------------------------------------------------- live PEFT


def by_peft(root: Path) -> Iterator[Case]:
    """Every tuner, trained and merged by PEFT."""
    for index, name in enumerate(tuner_worlds.names()):
        for number, size in enumerate(SIZES):
            tuner_worlds.DELTA_SHARE = size
            for dtype, safe in (one for one in REGIMES if one[0] in tuner_worlds.RECIPES[name].dtypes):
                if (index + number + REGIMES.index((dtype, safe))) % 2:
                    continue  # half of them, in turn: each regime meets each tuner
                world = tuner_worlds.build(name, root / f"{size:g}", dtype, safe)
                report = lora_check.check(world.base_dir, list(world.adapter_dirs), world.merged[dtype, safe], jobs=1)
                line = f"{name} {dtype} {'safe' if safe else 'plain'} {size:g}"
                yield Case("tuners", tuner_worlds.RECIPES[name].tuner, size, called(report), line)


def by_transformers(root: Path) -> Iterator[Case]:
    """Architectures whose files and parameters have other names or pieces; the delta is as PEFT is given it."""
    for name, dtype in layout_worlds.cases():
        base, adapter, merged = layout_worlds.build(name, root, dtype)
        again = root / f"{name}-{dtype}-shards"
        sharded(load_file(merged / "model.safetensors"), again, json.loads((merged / "config.json").read_text()))
        for layout, folder in (("one file", merged), ("shards", again)):
            report = lora_check.check(base, adapter, folder, jobs=1)
            yield Case("layouts", f"{name}, {layout}", 0.0, called(report), f"{name} {dtype} {layout}")


# ----------------------------------------------------------------------------------------------------------- page


def everything(parts: Sequence[str]) -> Iterator[Case]:
    makers: Mapping[str, Callable[[Path], Iterator[Case]]] = {
        "orders": lambda root: orders(),
        "models": whole_models,
        "tied": tied,
        "tuners": by_peft,
        "layouts": by_transformers,
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, maker in makers.items():
            if not parts or name in parts:
                root = Path(folder) / name
                root.mkdir()
                yield from maker(root)


TITLES = {
    "orders": "Orders of operations: single tensors, over ten pairs of dtypes",
    "models": "Whole models: bf16, fp16 and fp32, plain and safe_merge",
    "tuners": "Every tuner, trained and merged by PEFT: bf16 and fp32, plain and safe_merge",
    "layouts": "Architectures of transformers, merged by PEFT: bf16 and fp32",
}


def page(cases: Sequence[Case]) -> Iterator[str]:
    """The tables: how many cases of each row and size came to which word."""
    for part, title in TITLES.items():
        members = [one for one in cases if one.part == part]
        if not members:
            continue
        rows: dict[str, Counter[str]] = defaultdict(Counter)
        for one in members:
            rows[one.row][one.word] += 1
        yield f"\n## {title}\n"
        table = [[row, sum(counts.values()), *(counts[word] or "" for word in WORDS)] for row, counts in rows.items()]
        yield tabulate(table, ["", "cases", *WORDS], tablefmt="github")
        sizes = {size: Counter(one.word for one in members if one.size == size) for size in SIZES}
        if any(sizes.values()):
            yield ""
            table = [[f"{100 * size:g} %", *(counts[word] or "" for word in WORDS)] for size, counts in sizes.items()]
            yield tabulate(table, ["delta", *WORDS], tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", help="orders, models, tied, tuners, layouts; all without")
    parts = parser.parse_args().parts
    torch.set_num_threads(1)
    began, cases = time.monotonic(), []
    for one in everything(parts):
        cases.append(one)
        if one.word.isupper():
            print(f"{one.word}: {one.part}: {one.line}", file=sys.stderr, flush=True)
        if len(cases) % 500 == 0:
            print(f"{len(cases)} cases, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(HEAD.format(**{name: version(name) for name in ("peft", "torch")}))
    count = Counter(one.word for one in cases)
    words = ", ".join(f"{count[word]} {word}" for word in WORDS)
    print(f"{len(cases)} cases: {words}. {time.monotonic() - began:.0f} s.")
    print("\n".join(page(cases)))
    sys.exit(1 if count["REFUTED"] or count["ACCUSED"] else 0)


if __name__ == "__main__":
    main()

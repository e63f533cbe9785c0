"""An inspection as a person reads it, in text or markdown: the same blocks, in two dresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tabulate import tabulate

from lora_check.inspection.model import Model
from lora_check.inspection.outcome import Family, Inspection
from lora_check.inspection.predict import Predicted
from lora_check.renderers._words import many
from lora_check.types import AdapterConfig, Checkpoint, Finding

Row = Mapping[str, str]
SHOWN, KEPT = 3, (1, 2, 4, 8, 16, 32, 64, 128)
"""Tensors of a finding that are listed, and ranks whose share of the energy is told."""
NOTHING = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dress:
    """How a block is written: tables, headings, and text that is not ours."""

    table: str
    heading: Callable[[str], str]
    plain: Callable[[str], str]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _escaped(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\`*_[]<>|~&" else c for c in _printable(text))


DRESSES = {
    "text": Dress(table="simple", heading=lambda title: title, plain=_printable),
    "markdown": Dress(table="pipe", heading=lambda title: f"### {title}", plain=_escaped),
}


def render(seen: Inspection, form: str) -> str:
    """The page, with a row for each module and for each parameter where these are listed.

    form   "text" or "markdown"
    """
    page = _Page(seen, DRESSES[form])
    blocks = [*page.inputs(), *page.sizes(), *page.families(), *page.predicted()]
    blocks += [*page.spectra()] if "spectra" in seen.listed else []
    blocks += [*page.parameters()] if "parameters" in seen.listed else []
    blocks += [*page.findings(), *page.end()]
    return "\n\n".join(blocks) + "\n"


@dataclass(frozen=True, slots=True)
class _Page:
    seen: Inspection
    dress: Dress

    def inputs(self) -> Iterator[str]:
        """What was looked at, and what it is laid over."""
        lines = [*self._adapter(), *self._model()]
        between = "\n" if self.dress.table == "simple" else "  \n"
        yield between.join(lines)

    def _adapter(self) -> Iterator[str]:
        adapter = self.seen.adapter
        if adapter is None:
            return
        config, plain = adapter.config, self.dress.plain
        yield f"adapter  {plain(adapter.location)}"
        said = [config.method, *_letters(config)]
        said += [word for word, on in (("rsLoRA", config.rslora), ("DoRA", config.dora)) if on]
        said += [f"bias {config.biases}"] if config.biases != "none" else []
        yield f"         {plain(', '.join([*said, config.producer or adapter.dialect]))}; {_held(adapter.checkpoint)}"

    def _model(self) -> Iterator[str]:
        seen, model = self.seen, self.seen.model
        if model is None:
            return
        role = "base   " if seen.adapter else "model  "
        held = _held(seen.base) if seen.base else f"shapes from {self.dress.plain(_source(model))}"
        yield f"{role}  {self.dress.plain(model.location)}"
        yield f"         {held}"

    def sizes(self) -> Iterator[str]:
        """How many parameters there are, and how many of them the adapter has."""
        model, trained = self.seen.model, self.seen.trained
        told = [] if model is None else [f"{model.size:,} parameters"]
        if trained is not None:
            share = f", {100 * trained / model.size:.3g} % of the model" if model and model.size else ""
            told.append(f"{trained:,} in the adapter{share}")
        if told:
            yield "; ".join(told)

    def families(self) -> Iterator[str]:
        """The modules of an adapter, by name; of a checkpoint its parameters, by name and shape."""
        rows = [_family(one, self.dress.plain) for one in self.seen.families]
        if rows:
            yield self._table(rows)
        elif self.seen.adapter is None and self.seen.model and not self.seen.predicted:
            kinds = _kinds(self.seen, self.dress.plain)
            yield self._table(kinds) if kinds else "there is no parameter"

    def predicted(self) -> Iterator[str]:
        """What the asked targets and ranks come to."""
        found = self.seen.predicted
        if found is None:
            return
        yield self._table(_targets(found, self.dress.plain))
        yield self._table(_ranks(found))
        yield "MB are 10^6 bytes; a file is adapter_model.safetensors with its header"

    def spectra(self) -> Iterator[str]:
        """Singular values by family and by module, and where they lie beside W."""
        seen = self.seen
        if not seen.spectra:
            return
        yield self.dress.heading("spectra of s B A, by family: share of the energy that the leading ranks keep, in %")
        yield self._table([_energy(one, self.dress.plain) for one in seen.families if one.energy])
        yield self.dress.heading("by module")
        yield self._table([_module(seen, name, self.dress.plain) for name in sorted(seen.spectra, key=_natural)])
        if seen.alignments:
            worst = max(one.accuracy for one in seen.alignments.values())
            yield (
                "in W left, right: share of |sBA|^2 in W's r leading directions on that side, beside that of random "
                "ones;\nthese are found by a seeded randomised range finder, and are those of a matrix within "
                f"{worst:.2g} |W| of W"
            )

    def parameters(self) -> Iterator[str]:
        """Every parameter, named as PEFT names it where that is known."""
        seen, plain = self.seen, self.dress.plain
        if seen.attached:
            listed = [(one.name, one.shape, "trained" if one.trained else "") for one in seen.attached.parameters]
        else:
            listed = [(name, shape, "") for name, shape in (seen.model.parameters if seen.model else {}).items()]
        if listed and seen.adapter and not seen.attached:
            yield "not as PEFT names them, but as the base does, for the reason below:"
        if listed:
            yield self._table([{"parameter": plain(n), "shape": _shape(s), "": word} for n, s, word in listed])

    def findings(self) -> Iterator[str]:
        """What is wrong or odd, a block each."""
        for one in self.seen.findings:
            yield self._block(f"{one.severity}[{one.code}] {one.name}", one.message, one.tensors, _advice(one))
        for remark in self.seen.remarks:
            yield self._block(f"{remark.severity} {remark.name}", remark.message, remark.tensors, ())

    def _block(self, title: str, message: str, tensors: Sequence[str], advice: Sequence[str]) -> str:
        plain, rest = self.dress.plain, len(tensors) - SHOWN
        names = [plain(name) for name in tensors[:SHOWN]] + ([f"and {rest} more"] if rest > 0 else [])
        lines = [*names, *map(plain, advice)]
        lead = "  " if self.dress.table == "simple" else "- "
        return "\n".join([f"{plain(title)}: {plain(message)}", *(f"{lead}{line}" for line in lines)])

    def end(self) -> Iterator[str]:
        """What was not looked at, and the sum of it all."""
        seen, plain = self.seen, self.dress.plain
        lines = [f"could not be looked at: {plain(one)}" for one in seen.unseen]
        lines += [f"not looked at: {plain(one)}" for one in seen.apart]
        if lines:
            yield ("\n" if self.dress.table == "simple" else "  \n").join(lines)
        if seen.adapter is not None and seen.sound:
            wrong = len(seen.findings) + len(seen.remarks)
            yield f"{wrong} told above" if wrong else "nothing wrong in what was looked at"

    def _table(self, rows: Sequence[Row]) -> str:
        left = {"adapter", "family", "module", "parameter", "", "kind", "in -> out", "shape", "target"}
        align = ["left" if column in left else "right" for column in rows[0]]
        cells = [list(row.values()) for row in rows]
        return tabulate(cells, list(rows[0]), tablefmt=self.dress.table, colalign=align, disable_numparse=True)


def _letters(config: AdapterConfig) -> list[str]:
    """Rank and alpha, of a method that has them."""
    rank = config.rank or config.raw.get("r")
    alpha = [f"alpha = {config.alpha:g}"] if config.alpha or config.method == "LORA" else []
    return [*([f"r = {rank}"] if rank else []), *alpha]


def _source(model: Model) -> str:
    """What a model's shapes are told by, where it is not its headers."""
    if model.told_by == "table":
        return "a table"
    classes = model.config.get("architectures")
    if not classes:
        return f"transformers' {model.config.get('model_type')} without a head: config.json names no class"
    return f"{classes[0]}, the class that config.json names"


def _held(checkpoint: Checkpoint) -> str:
    metas = checkpoint.metas().values()
    dtypes = ", ".join(sorted({meta.stored_as for meta in metas}))
    return f"{many(len(metas), 'tensor')}, {_mb(sum(meta.nbytes for meta in metas))} MB {dtypes}".rstrip()


def _family(one: Family, plain: Callable[[str], str]) -> dict[str, str]:
    rank = NOTHING if one.rank is None else _span(one.rank)
    return {
        "family": plain(one.name),
        "modules": str(one.modules),
        "in -> out": ", ".join(f"{wide} -> {out}" for wide, out in one.sides) or NOTHING,
        "r": _several(one.ranks),
        "alpha": _several(one.alphas),
        "s": _several(one.scales),
        "parameters": f"{one.parameters:,}",
        "rank of BA": rank,
        "effective": _number(one.effective_rank),
        "stable": _number(one.stable_rank),
        "delta": _number(one.norm),
        **({"delta/W %": _number(100 * one.relative)} if one.relative is not None else {}),
    }


def _kinds(seen: Inspection, plain: Callable[[str], str]) -> list[dict[str, str]]:
    """What a checkpoint consists of: parameters of one name and one shape."""
    assert seen.model
    groups: dict[tuple[str, tuple[int, ...], str], int] = {}
    for name, shape in seen.model.parameters.items():
        module, _, leaf = name.rpartition(".")
        kind = seen.model.kinds.get(module, "") if leaf == "weight" else ""
        key = (".".join(name.split(".")[-2:]), shape, kind if kind != "other" else "")
        groups[key] = groups.get(key, 0) + 1
    return [
        {
            "parameter": plain(name),
            "shape": _shape(shape),
            "kind": kind,
            "count": str(count),
            "numbers": f"{count * prod(shape):,}",
        }
        for (name, shape, kind), count in groups.items()
    ]


def _targets(found: Predicted, plain: Callable[[str], str]) -> list[dict[str, str]]:
    rows = [
        {
            "target": plain(one.family),
            "kind": one.kind,
            "in -> out": f"{one.wide} -> {one.out}",
            "modules": str(one.modules),
            "for each rank": f"{one.for_each_rank:,}",
        }
        for one in found.targets
    ]
    total = f"{sum(one.for_each_rank for one in found.targets):,}"
    count = str(sum(one.modules for one in found.targets))
    return [*rows, {"target": "all", "kind": "", "in -> out": "", "modules": count, "for each rank": total}]


def _ranks(found: Predicted) -> list[dict[str, str]]:
    full = {"adapter": "full fine-tuning", "parameters": f"{found.full:,}", "% of the model": "100"}
    empty = dict.fromkeys(("file MB fp32", "file MB bf16"), NOTHING)
    return [
        {**full, "MB fp32": _mb(4 * found.full), "MB bf16": _mb(2 * found.full), **empty},
        *(
            {
                "adapter": f"LoRA r = {one.rank}",
                "parameters": f"{one.parameters:,}",
                "% of the model": f"{100 * one.parameters / found.full:.3g}",
                "MB fp32": _mb(one.bytes["float32"]),
                "MB bf16": _mb(one.bytes["bfloat16"]),
                "file MB fp32": _mb(one.file_bytes["float32"]),
                "file MB bf16": _mb(one.file_bytes["bfloat16"]),
            }
            for one in found.ranks
        ),
    ]


def _energy(one: Family, plain: Callable[[str], str]) -> dict[str, str]:
    kept = [rank for rank in KEPT if rank <= len(one.energy)] or [1]
    if kept[-1] != len(one.energy):
        kept.append(len(one.energy))
    shares = [f"{100 * one.energy[rank - 1]:.3g} in {rank}" for rank in kept]
    return {
        "family": plain(one.name),
        "modules": str(one.spectra),
        "% of the energy in so many ranks": ", ".join(shares),
    }


def _module(seen: Inspection, name: str, plain: Callable[[str], str]) -> dict[str, str]:
    one, beside = seen.spectra[name], seen.alignments.get(name)
    values = " ".join(_number(value) for value in one.values[:4])
    module = next(module for module in seen.modules if module.name == name)
    told = {
        "module": plain(name),
        "r": str(module.rank),
        "alpha": f"{module.scale.alpha:g}" if module.scale else NOTHING,
        "s": f"{module.scale.value:.4g}" if module.scale else NOTHING,
        "rank of BA": str(one.resolved),
        "effective": _number(one.effective_rank),
        "stable": _number(one.stable_rank),
        "delta": _number(one.norm),
        "singular values": values + (" ..." if len(one.values) > 4 else ""),
    }
    if not seen.alignments:
        return told
    if beside is None:
        return told | dict.fromkeys(("delta/W %", "in W left %", "in W right %", "amplified"), NOTHING)
    return told | {
        "delta/W %": _number(100 * beside.relative),
        "in W left %": f"{100 * beside.left:.3g} ({100 * beside.chance[0]:.2g})",
        "in W right %": f"{100 * beside.right:.3g} ({100 * beside.chance[1]:.2g})",
        "amplified": _number(beside.amplification),
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """So that layer 10 comes after layer 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _advice(one: Finding) -> list[str]:
    return [*([f"help: {one.help}"] if one.help else []), f"explain {one.code}"]


def _several(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:SHOWN])
    return f"{shown}, ..." if len(values) > SHOWN else shown or NOTHING


def _span(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.3g}" if size < 1e9 else f"{size / 1e6:,.0f}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "()"

"""Results -> the answers in words, each with its figures; what a run does not hold is answered with what is missing.

An invalid time is never used. An overhead within the A/A spread is `none that this run can see`, not a small number.
Whole models are asked first, else blocks, else modules; every sentence says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import ceil, exp, inf, log

from benchmarks.latency.crossing import crossing
from benchmarks.latency.figures import overhead, summary
from benchmarks.latency.floors import tokens_to_merge
from benchmarks.latency.nouns import Cell, Phase, Results, Row
from benchmarks.latency.speaking import LEVELS, Run, View, about, clocks, judge, plainness, speaking, views
from benchmarks.latency.traffic import width
from benchmarks.latency.verdicts import BUSY, WALL, invalid, percent, signed, us

WIDE, NARROW = "peft_float32", "peft_storage"
"""The two dtypes of one implementation."""
COUNTED = ("two", "compiled", "eager", "peft")
"""Traffic beyond the base product that grows with the tokens alone."""


def sentences(results: Results, *, disk: float | None = None) -> list[str]:
    """What the results say, a sentence an answer.

    disk   bytes a second of a disk, to ask also when a merge through files has paid for itself
    """
    questions: tuple[tuple[str, Callable[[Run], Iterable[str]]], ...] = (
        ("Decoding", partial(cost, phase="decode")),
        ("Prefill", partial(cost, phase="prefill")),
        ("Launches", launches),
        ("Merging pays", partial(payback, phase="decode", disk=disk)),
        ("Merging pays", partial(payback, phase="prefill", disk=disk)),
        ("Several adapters, time", several),
        ("Several adapters, memory", memory),
        ("Adapter dtype", dtype),
        ("Merging inside the forward", inside),
    )
    run = judge(results)
    told = [f"{question}: {answer}" for question, ask in questions for answer in ask(run)]
    bad, all_ = invalid(run.judged), sum(map(len, run.judged))
    return [*told, f"Invalid: {bad} of {all_} times" + (", none of them used above." if bad else ".")]


def missing(what: str) -> Iterator[str]:
    """The answer to a question that the results do not hold."""
    yield f"not measured: {what}."


# ---------------------------------------------------------------------------------------------------- the overhead


def cost(run: Run, *, phase: Phase) -> Iterator[str]:
    """What every backend costs over merged."""
    found = [view for clock in clocks(run) for view in speaking(run, clock, phase) if view.unmerged()]
    if not found:
        yield from missing(f"a cell with one adapter in {phase} that has a valid time of merged and another backend")
    for view in found:
        noise = f"A/A {percent(view.spread)}" if view.spread < inf else "A/A not known"
        each = ", ".join(f"{row.backend} {over(view, row)}" for row in view.unmerged())
        yield f"{about(view)}: merged {us(view.seconds)} ({noise}); over it {each}."


def over(view: View, row: Row) -> str:
    """The overhead of a row in words."""
    said = view.said(row)
    if said is None or said.word == "invalid":
        return "invalid"
    if said.overhead is None or said.spread is None:
        return "not known (no A/A)"
    return "none that this run can see" if abs(said.overhead) <= said.spread else signed(said.overhead)


def launches(run: Run) -> Iterator[str]:
    """Which part of an eager loop's overhead in decoding is launches: from wall against busy, and by counting."""
    price = run.results.ceilings.launch.get(WALL)
    told = []
    for view in speaking(run, WALL, "decode"):
        each = [split for row in view.unmerged() if (split := waiting(view, row, price))]
        waits = view.said(view.merged)
        if each and waits is not None and waits.launches is not None:
            alone = f"the device waits {percent(waits.launches)} of the time of merged"
            told.append(f"{about(view)}: {alone}; of what is added to it {', '.join(each)}.")
    yield from told or missing("decoding by eager_wall and device_busy with kernels counted, which takes a GPU")


def waiting(view: View, row: Row, price: float | None) -> str:
    """Which part of the cost of one backend is launches; empty where a clock is missing or there is no cost to see."""
    busy, said, added = replace(view, clock=BUSY), view.said(row), excess(view, row)
    if added is None or added <= 0 or said is None or said.launches is None:
        return ""
    if not (busy.valid(row) and busy.valid(view.merged)) or row.kernels is None or view.merged.kernels is None:
        return ""
    working = summary(row.clocks[BUSY]).median - busy.seconds
    share = min(1.0, max(0.0, 1 - working / added))
    more = row.kernels - view.merged.kernels
    counted = f"{more:,} more kernels" + ("" if price is None else f" at {us(price)} are {us(more * price)}")
    return f"{row.backend} {percent(share)} of {us(added)} is waiting for launches ({counted})"


def excess(view: View, row: Row) -> float | None:
    """Seconds over merged of one call; None where the run cannot see any."""
    said = view.said(row)
    if said is None or said.word == "invalid" or said.overhead is None or said.spread is None:
        return None
    return said.overhead * view.seconds if abs(said.overhead) > said.spread else None


# --------------------------------------------------------------------------------------------- when a merge has paid


def payback(run: Run, *, phase: Phase, disk: float | None) -> Iterator[str]:
    """After how many decoded tokens, or prompts, the seconds of merging are saved."""
    views_ = [view for clock in clocks(run) for view in speaking(run, clock, phase)]
    found = [view for view in views_ if view.measured.merge.samples and view.unmerged()]
    if not found:
        yield from missing(f"seconds of merging beside a valid time of {phase}")
    for view in found:
        once = summary(view.measured.merge).median
        yield f"merging on the device takes {us(once)} and has paid for itself {paid(view, once)}."
        if disk is not None:
            slow = 2 * view.weights / disk
            files = (
                f"through a disk of {disk / 1e9:g} GB/s the adapted weights alone are read and written in {slow:.3g} s"
            )
            yield f"{files}, paid {paid(view, slow)}."


def paid(view: View, once: float) -> str:
    """After how many forwards, for every backend."""
    unit = "decoded tokens" if view.cell.phase == "decode" else f"prompts of {view.cell.length:,} tokens"
    each = ", ".join(f"{row.backend} {after(view, row, once)}" for row in view.unmerged())
    many = f" ({view.cell.batch} sequences at once)" if view.cell.batch > 1 else ""
    return f"after so many {unit}{many} ({about(view)}): {each}"


def after(view: View, row: Row, once: float) -> str:
    """The first forward after which merging was cheaper."""
    said, saved = view.said(row), excess(view, row)
    if said is None or said.word == "invalid":
        return "invalid"
    if saved is None:
        spread = view.spread
        least = f"not before {ceil(once / (spread * view.seconds)):,}" if 0 < spread < inf else "not known"
        return f"{least} (it saves nothing that this run can see)"
    if saved <= 0:
        return "never (merged is slower)"
    count = ceil(once / saved)
    return "already at 1" if count == 1 else f"{count:,}"


# ------------------------------------------------------------------------------------------------- several adapters


def several(run: Run) -> Iterator[str]:
    """From how many adapters on one unmerged forward beats as many merged copies."""
    told = []
    for clock in clocks(run):
        mixed = [view for view in views(run, clock) if view.cell.adapters > 1]
        for same in grouped(mixed, lambda cell: replace(cell, adapters=1)):
            points = along(same, lambda cell: cell.adapters, overhead_of)
            each = ", ".join(f"{name} {crossing(line, 'n')}" for name, line in points.items())
            if each:
                told.append(f"n merged copies are beaten by {each} ({without(same[0], 'adapters')}).")
    yield from told or missing("batches of several adapters beside as many merged copies")


def memory(run: Run) -> Iterator[str]:
    """An adapter against the weights, in bytes, and how many of each fit on the device."""
    held = device_memory(run.results)
    found = [view for clock in clocks(run)[:1] for view in speaking(run, clock)]
    if not found:
        yield from missing("any cell with one adapter")
    for view in found:
        whole = view.weights
        parameters = sum(outputs + inputs for outputs, inputs in view.measured.modules) * view.cell.rank
        one = parameters * width(view.cell.dtype)
        wide = "" if view.cell.dtype == "float32" else f" ({size(4 * parameters)} in float32)"
        yield (
            f"{view.cell.workload} {view.cell.shape}: an adapter of r = {view.cell.rank} is {size(one)}{wide}, the "
            f"weights that it adapts are {size(whole)}, {whole / one:,.0f} times as much; {fitting(held, whole, one)}."
        )


def fitting(held: int | None, whole: int, one: int) -> str:
    """How many merged copies, or adapters beside one base, a memory holds."""
    if held is None:
        return "not measured: the memory of the device"
    alone = "counting the adapted weights alone"
    if held < whole:
        return f"not one copy fits into {size(held)}"
    adapters = (held - whole) // one
    return f"{size(held)} hold {held // whole:,} merged copies, or one base and {adapters:,} adapters, {alone}"


def device_memory(results: Results) -> int | None:
    """Bytes, as the header has them."""
    device = results.environment.get("device")
    found = device.get("memory") if isinstance(device, Mapping) else None
    return found if isinstance(found, int) and found > 0 else None


def size(count: float) -> str:
    """Three digits and a unit."""
    for limit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.3g} {name}"
    return f"{count:g} bytes"


# ------------------------------------------------------------------------------- the adapter's dtype, merging inside


def dtype(run: Run) -> Iterator[str]:
    """What PEFT's fp32 adapters cost over adapters in the dtype of the base."""
    told = []
    for clock in clocks(run):
        for view in (view for phase in ("decode", "prefill") for view in speaking(run, clock, phase)):
            wide, narrow = view.row(WIDE), view.row(NARROW)
            if wide is None or narrow is None or view.cell.dtype == "float32":
                continue
            more = overhead(wide, narrow, clock)
            if more is not None:
                by = signed(more.median) if seen(view, more.median) else "none that this run can see"
                told.append(f"float32 over {view.cell.dtype} adapters, {WIDE} over {NARROW}: {by} ({about(view)}).")
    yield from told or missing(f"{WIDE} and {NARROW} in one cell whose base is not float32")


def inside(run: Run) -> Iterator[str]:
    """Above how many tokens merging in every forward beats an unmerged one; beside it the count of bytes.

    Single modules are asked first: only for them the count can be made, and they were run at most numbers of tokens.
    """
    told = []
    for clock in clocks(run)[:1]:
        for same in sweeps(list(views(run, clock))):
            points = along(same, lambda cell: cell.tokens, inside_over)
            each = [f"{name} {crossing(line, 'T', log, exp)}{counted(same, name)}" for name, line in points.items()]
            if each:
                told.append(f"it beats {', '.join(each)} ({without(same[0], 'tokens')}).")
    yield from told or missing("a backend that merges inside, beside others")


def sweeps(found: Sequence[View]) -> list[list[View]]:
    """For each shape of the first level that has any, the cells that differ in tokens alone, as plain as there are."""
    for level in reversed(LEVELS):
        fitting = [view for view in found if view.cell.workload == level and view.cell.adapters == 1]
        groups = grouped(sorted(fitting, key=plainness), lambda cell: replace(cell, batch=1, length=1, context=0))
        shapes: dict[str, list[View]] = {}
        for group in groups:
            if any(map(inside_over, group)):
                shapes.setdefault(group[0].cell.shape, group)
        if shapes:
            return list(shapes.values())
    return []


def counted(same: Sequence[View], name: str) -> str:
    """The crossing by counted bytes, of a single module and where they grow with the tokens alone."""
    view = next(view for view in same if view.row(name))
    row, modules = view.row(name), view.measured.modules
    if row is None or len(modules) != 1 or row.traffic not in COUNTED:
        return ""
    ((outputs, inputs),) = modules
    tokens = tokens_to_merge(inputs, outputs, row.traffic, view.cell.dtype, row.adapter)
    return f"; by counted bytes at {tokens:,.0f}"


def overhead_of(view: View) -> dict[str, float]:
    """Of every backend that may be used, over merged."""
    found = {row.backend: overhead(row, view.merged, view.clock) for row in view.unmerged() if view.valid(row)}
    return {name: seen(view, figures.median) for name, figures in found.items() if figures is not None}


def seen(view: View, difference: float) -> float:
    """A difference, or 0 where the run cannot tell it from none: a tie is no win."""
    return difference if abs(difference) > view.spread else 0.0


def inside_over(view: View) -> dict[str, float]:
    """Merging inside over every other backend of the same function that may be used."""
    merging = next((row for row in view.unmerged() if row.traffic == "merge" and view.valid(row)), None)
    if merging is None:
        return {}
    others = [row for row in view.unmerged() if row.traffic not in ("merge", "dora") and view.valid(row)]
    found = {row.backend: overhead(merging, row, view.clock) for row in others}
    return {name: seen(view, figures.median) for name, figures in found.items() if figures is not None}


def grouped(found: Iterable[View], kind: Callable[[Cell], Cell]) -> list[list[View]]:
    """Views whose cells are alike but for what `kind` takes away."""
    groups: dict[Cell, list[View]] = {}
    for view in found:
        groups.setdefault(kind(view.cell), []).append(view)
    return list(groups.values())


def along(
    same: Iterable[View], axis: Callable[[Cell], int], of: Callable[[View], Mapping[str, float]]
) -> dict[str, list[tuple[float, float]]]:
    """Backend -> (x, ratio - 1), in the order of x."""
    found: dict[str, list[tuple[float, float]]] = {}
    for view in sorted(same, key=lambda view: axis(view.cell)):
        for name, value in of(view).items():
            found.setdefault(name, []).append((axis(view.cell), value))
    return found


def without(view: View, what: str) -> str:
    """A group of cells in words."""
    cell = view.cell
    tokens = f"{cell.batch} x {cell.length} tokens, " if what != "tokens" else ""
    return f"{cell.workload} {cell.shape}, {tokens}r = {cell.rank}, {cell.dtype}, {cell.cache}, by {view.clock}"

"""Are the numbers right? Each backend is held to the budget before it is timed; a wrong answer gets no time.

Held to it is every target module, on the inputs that it really got, in every copy, and once more with other inputs: an
answer that was kept from the last call is then wrong. A single module is looked at as a whole; of the modules of a
block or a model, which may see thousands of tokens each, TOKENS of every sequence, from the first to the last.

On a GPU the device is kept busy before the other inputs are written, so that work on another stream, which waits for
nobody, reads the old ones. Nothing waits for the device between a call and the copy of its output, and the output may
not change once the device has come to rest. There the first copy is also captured in a CUDA graph and replayed on
inputs that the graph has never seen.

The gate has to see: where an output without the adapter could be within the budget, it refuses the whole problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.latency import budget
from benchmarks.latency.nouns import Backend, Gate, Place, Site, Subject
from benchmarks.latency.place import captured, stall, synchronise
from benchmarks.latency.watch import TOKENS, Look, Watch, same_bits, weigh

FIRST, STALE, SECOND, UNSEEN = 1, 2, 3, 4
"""Seeds of the inputs: of every copy, then those that nothing may be computed from, those of the second look, and those
that a graph has never seen."""
TOUCHED = "it changes the base or the adapter"
LENGTH = 200
"""Characters kept of what a backend raised."""


@dataclass(slots=True, kw_only=True, eq=False)
class Trial:
    """A backend's module for every site of every copy, and what is known of it so far.

    missing    why it cannot run here, or what it raised         replayed    as in Gate
    fixed      why it has no time under graph replay             wrong       as in Gate
    """

    backend: Backend
    modules: tuple[Mapping[str, nn.Module], ...] = ()
    share: float = 0.0
    bitwise: bool = True
    replayed: str = ""
    fixed: str = ""
    wrong: str = ""
    missing: str = ""

    @property
    def open(self) -> bool:
        """Nothing has been found against it."""
        return not (self.wrong or self.missing)

    @property
    def gate(self) -> Gate | None:
        """The finding; None where it never came to one."""
        if self.missing:
            return None
        return Gate(share=self.share, bitwise=self.bitwise and self.open, replayed=self.replayed, wrong=self.wrong)


def build(subject: Subject, backend: Backend, place: Place) -> Trial:
    """Build a module for every site of every copy, the bases shared; or say why there is none."""
    trial = Trial(backend=backend, missing=backend.missing(place))
    modules: list[Mapping[str, nn.Module]] = []
    for sites in () if trial.missing else subject.sites:
        kept = Kept(sites)
        try:
            modules.append({path: backend.build(site).eval() for path, site in sites.items()})
        except Exception as error:  # noqa: BLE001 - whatever a backend raises is why it has no time
            trial.missing = reason(error)
            break
        finally:
            trial.wrong = TOUCHED if kept.changed() else trial.wrong
    trial.modules = () if trial.missing else tuple(modules)
    return trial


@contextmanager
def installed(subject: Subject, modules: Sequence[Mapping[str, nn.Module]]) -> Iterator[None]:
    """Modules in place of the targets of the first copies, and afterwards, whatever happens, the bases again."""
    try:
        put(subject, modules)
        yield
    finally:
        touched = zip(subject.sites, modules, strict=False)
        put(subject, [{path: site.base for path, site in sites.items() if by_path} for sites, by_path in touched])


def put(subject: Subject, modules: Sequence[Mapping[str, nn.Module]]) -> None:
    """Set modules by their paths, copy by copy."""
    for copy, by_path in zip(subject.copies, modules, strict=False):
        for path, module in by_path.items():
            parent, _, name = path.rpartition(".")
            setattr(copy.get_submodule(parent), name, module)


def reason(error: BaseException) -> str:
    """What was raised, in one line."""
    said = " ".join(str(error).split())[:LENGTH]
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory: {said}".removesuffix(": ")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


# --------------------------------------------------------------------------------------------------------- one call


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """One call of a backend: its output as it was at once, what was seen of each module, and what is wrong so far."""

    trial: Trial
    output: Tensor
    looks: tuple[Look, ...]
    wrong: str


def called(subject: Subject, trial: Trial, index: int, place: Place) -> Seen | None:
    """One watched call of a copy; None, with the reason in the trial, where it raises."""
    sites, looks = subject.sites[index], list[Look]()
    tokens = 0 if len(sites) == 1 else TOKENS
    watched = {
        path: Watch(module, path, len(sites[path].base.weight), tokens, looks)
        for path, module in trial.modules[index].items()
    }
    try:
        with installed(subject, [*({} for _ in range(index)), watched]):
            output = subject.call(subject.copies[index], subject.inputs[index])
            at_once = output.clone()
            synchronise(place)
    except Exception as error:  # noqa: BLE001 - whatever a backend raises is why it has no time
        trial.wrong = next(misfits(looks), "")
        trial.missing = "" if trial.wrong else reason(error)
        return None
    wrong = next(iter((*misfits(looks), *uncalled(looks, sites), *unsteady(output, at_once))), "")
    return Seen(trial=trial, output=at_once, looks=tuple(looks), wrong=wrong)


def misfits(looks: Sequence[Look]) -> Iterator[str]:
    """Outputs that cannot be compared; what raised after one of them, raised because of it."""
    yield from (f"{one.where}: {one.wrong}" for one in looks if one.wrong)


def uncalled(looks: Sequence[Look], sites: Mapping[str, Site]) -> Iterator[str]:
    """Targets that were not called."""
    found = {one.where for one in looks}
    yield from (f"{path}: it was not called" for path in sites if path not in found)


def unsteady(output: Tensor, at_once: Tensor) -> Iterator[str]:
    """What is wrong with the output of the whole subject."""
    if not bool(same_bits(output, at_once)):
        yield "the output changed after the call: work on another stream"
    if not bool(at_once.isfinite().all()):
        yield "the output is not finite"


def weighed(sites: Mapping[str, Site], calls: Sequence[Seen]) -> None:
    """Hold the calls of all backends on one copy to the budget, site by site, and write what is found to their trials.

    raises   BlindError: the adapter could be missing unseen
    """
    fit = [seen for seen in calls if not any(one.wrong for one in seen.looks)]
    references = {seen.trial.backend.reference or budget.lora for seen in fit}
    for path, site in sites.items():
        for reference in references:
            of = [seen for seen in fit if (seen.trial.backend.reference or budget.lora) is reference]
            looks = [one for seen in of for one in seen.looks if one.where == path]
            if looks:
                weigh(site, reference, looks)
    for seen in calls:
        trial = seen.trial
        if seen in fit:
            shares = [trial.share, *(one.share for one in seen.looks)]
            trial.share = max(shares, key=lambda share: float("inf") if share != share else share)
            over = next(filter(None, (one.finding() for one in seen.looks)), "")
            trial.wrong = trial.wrong or over
        trial.wrong = trial.wrong or seen.wrong


# --------------------------------------------------------------------------------------------------- all backends


class Kept:
    """What no backend may change: the weights and factors of a copy, as they were."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.tensors = [tensor for site in sites.values() for tensor in shared(site)]
        self.before = [tensor.clone() for tensor in self.tensors]

    def changed(self) -> bool:
        """Whether any was changed; it is put right again."""
        return restored(self.before, self.tensors)


def shared(site: Site) -> list[Tensor]:
    """The tensors of a site that all backends share."""
    bias = [] if site.base.bias is None else [site.base.bias]
    return [tensor.detach() for tensor in (site.base.weight, *bias, site.a, site.b)]


def restored(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """Whether tensors had other bits than before; they have the old ones now."""
    other = [(old, new) for old, new in zip(before, now, strict=True) if not bool(same_bits(old, new))]
    for old, new in other:
        new.copy_(old)
    return bool(other)


def judge(subject: Subject, trials: Sequence[Trial], place: Place) -> None:
    """Every copy with one fill of the inputs, the first copy with another; on a GPU, that one under graph replay too.

    raises   BlindError: the problem would let a backend pass that forgets the adapter
    """
    subject.refill(FIRST)
    for index in range(len(subject.copies)):
        of_copy(subject, trials, index, place)

    def overtake() -> None:
        subject.refill(STALE)
        synchronise(place)
        stall(place)
        subject.refill(SECOND)

    of_copy(subject, trials, 0, place, overtake)
    for trial in trials:
        if place.kind == "cuda" and trial.open:
            of_graph(subject, trial, place)
        if not trial.open:
            trial.modules = ()
    subject.refill(FIRST)


def of_copy(
    subject: Subject, trials: Sequence[Trial], index: int, place: Place, before: Callable[[], None] = lambda: None
) -> None:
    """Judge every backend that is still open on one copy, and compare its bits with those of the first merged one."""
    kept, calls = Kept(subject.sites[index]), list[Seen]()
    for trial in (one for one in trials if one.open):
        before()
        now = [given for given in subject.inputs[index] if isinstance(given, Tensor)]
        inputs = [given.clone() for given in now]
        seen = called(subject, trial, index, place)
        if seen is not None:
            calls.append(seen)
        if kept.changed():
            trial.wrong = TOUCHED
        if restored(inputs, now):
            trial.wrong = trial.wrong or "it changes the inputs of the forward"
    weighed(subject.sites[index], calls)
    merged = next((seen.output for seen in calls if seen.trial.backend.merged and seen.trial.open), None)
    for seen in calls:
        seen.trial.bitwise &= merged is not None and bool(same_bits(merged, seen.output))


# ---------------------------------------------------------------------------------------------------- under a graph


def of_graph(subject: Subject, trial: Trial, place: Place) -> None:
    """Replay the first copy on inputs that the graph has not seen, over a buffer of NaN; compare with eager's bits.

    One module may also differ from eager within the budget, as another kernel may be chosen while a graph is captured.
    """
    copy, inputs = subject.copies[0], subject.inputs[0]
    try:
        with installed(subject, trial.modules[:1]):
            replay, output = captured([lambda: subject.call(copy, inputs)], place)
            subject.refill(UNSEEN)
            output.fill_(float("nan"))
            replay()
            replayed = output.clone()
            synchronise(place)
    except Exception as error:  # noqa: BLE001 - whatever is raised is why it cannot be captured
        trial.fixed = f"cannot be captured in a CUDA graph: {reason(error)}"
        return
    seen = called(subject, trial, 0, place)
    if seen is None:
        return
    if bool(same_bits(replayed, seen.output)):
        trial.replayed = "same"
    elif within(subject, trial, seen, replayed):
        trial.replayed = "within"
    else:
        trial.replayed, trial.fixed = "wrong", "wrong under graph replay, on inputs that its capture had not seen"


def within(subject: Subject, trial: Trial, seen: Seen, replayed: Tensor) -> bool:
    """Whether the replayed output of a subject that is one module is within that module's budget."""
    if len(seen.looks) != 1 or seen.looks[0].y.shape != replayed.shape:
        return False
    look = replace(seen.looks[0], y=replayed)
    weigh(subject.sites[0][look.where], trial.backend.reference or budget.lora, [look])
    return look.share <= 1

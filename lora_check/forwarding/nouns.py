"""The nouns of a forward: what is asked of three models, what each says, where they part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lora_check.forwarding.kinds import Kind
from lora_check.types import Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from lora_check.report import Report

Answer = Literal["agrees", "departs", "undecided"]
How = Literal["output", "input", "arrival", "calls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One sequence of token ids.

    text   what it was encoded from; empty where ids were given
    goes_on   whether it is a prompt, which models that talk continue; else it is only read, for the perplexity
    cut    how many ids did not fit into the context and were left out
    split  where one half is read and the other answered: how many ids are read; else 0
    """

    ids: tuple[int, ...]
    text: str = ""
    goes_on: bool = True
    cut: int = 0
    split: int = 0

    @property
    def told(self) -> tuple[int, ...]:
        """The token after each position, as far as there is one."""
        return self.ids[self.split or 1 :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What one model answers.

    logits   (positions, vocabulary) of each sequence, or what `Kind` says, in the dtype of the model
    new      the greedy continuation of each sequence, ids; empty where none was wanted
    steps    (new tokens, vocabulary) logits behind each of them
    remarks  what transformers left out when it loaded the files
    invented   what it, or PEFT, had to make up
    brought  what it made up and an adapter replaces: true of no answer but the base's
    """

    logits: tuple[Tensor, ...]
    new: tuple[tuple[int, ...], ...] = ()
    steps: tuple[Tensor | None, ...] = ()
    remarks: tuple[str, ...] = ()
    invented: tuple[str, ...] = ()
    brought: tuple[str, ...] = ()
    circumstances: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """A module that, given what the unmerged model gives it, answers something that no rounding explains.

    how      its "output"; the "input" that the code around it makes of the outputs before it; the "arrival" of the
             adapter's effect, as a whole; how often it "calls"
    place    the module; of an input, the one around it
    order    the place of its first departing call in the order of execution
    size     largest |actual - true|       budget   what rounding can make of it there
    share    of the adapter's effect that arrives: 1 in an honest merge, 0 where nothing was merged; None: no adapter
    sure     False: how much this kind of module may round is not derived, so that its weight has to decide
    """

    place: str
    how: How
    order: int
    size: float = 0.0
    budget: float = 0.0
    share: float | None = None
    sure: bool = True
    says: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lockstep:
    """All modules of the merged model, each given what the unmerged model gives it.

    modules  how many of them run      idle   those that these sequences never reach
    arrivals   adapted module -> (share of the adapter's effect that arrives, what rounding can make of it)
    unjudged   why it could not be done, where it could not
    """

    modules: int = 0
    departures: tuple[Departure, ...] = ()
    arrivals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    unjudged: str = ""
    idle: tuple[str, ...] = ()

    @property
    def answer(self) -> Answer:
        """Whether the merged model computes what base and adapters compute."""
        if any(one.sure for one in self.departures):
            return "departs"
        return "undecided" if self.departures or self.unjudged or not self.modules else "agrees"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """How far the answers of one model lie from those of another, over all positions of all sequences.

    kl_mean, kl_max   KL(other || one) of the distributions, nats; None where the answers are none
    logit_max         largest |difference| of two logits, or of whatever is answered
    agreement         share of positions with the same most likely token or label; None as above
    exact             every number has the same bits
    """

    one: str
    other: str
    positions: int
    kl_mean: float | None
    kl_max: float | None
    logit_max: float
    agreement: float | None
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """Where two continuations part: after how many common tokens, with which, and by what margins.

    margins   by how much each model prefers its own token to the other's, logits
    by_rounding   a near tie, for nothing but rounding lies between the two models
    """

    sequence: int
    position: int
    tokens: tuple[int | None, int | None]
    margins: tuple[float, float] | None
    by_rounding: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """The outcome: what the files say, and what the models built of them say.

    tokens   id -> text, of those at which continuations part
    """

    report: Report
    kind: Kind
    asked: tuple[Asked, ...]
    said: Mapping[str, Said]
    pairs: tuple[Pair, ...]
    perplexities: Mapping[str, float | None]
    partings: tuple[Parting, ...]
    lockstep: Lockstep
    weights: Mapping[str, tuple[str, ...]]
    differences: Mapping[str, Mapping[str, tuple[Any, Any]]]
    remarks: tuple[str, ...]
    circumstances: Mapping[str, str]
    spoken: Mapping[str, tuple[str, ...]]
    tokens: Mapping[int, str]
    seconds: float

    @property
    def answer(self) -> Answer:
        """Whether the merged model computes what base and adapters compute; numbers that were made up prove nothing."""
        if self.invented("base", "unmerged"):
            return "undecided"
        return "undecided" if self.invented("merged") and self.lockstep.answer == "agrees" else self.lockstep.answer

    def invented(self, *names: str) -> tuple[str, ...]:
        """What had to be made up for these models."""
        return tuple(dict.fromkeys(line for name in names for line in self.said[name].invented))

    @property
    def verdict(self) -> Verdict:
        """The worse of what the weights and what the computation say."""
        computed = {"agrees": Verdict.VERIFIED, "departs": Verdict.REFUTED, "undecided": Verdict.INCONCLUSIVE}
        return max(self.report.verdict, computed[self.answer], key=lambda one: one.rank)

    @property
    def first(self) -> Departure | None:
        """The first in the order of execution; one that is sure before others, told by what arrives of the adapter."""
        found = self.lockstep.departures
        return min(found, key=lambda one: (not one.sure, one.order, one.how != "arrival"), default=None)

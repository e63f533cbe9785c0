"""The nouns. Frozen, keyword-only, and importing nothing of ours.

Shapes are written (out, in). A dtype is its torch name without the prefix: "bfloat16".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Severity = Literal["error", "warning", "info"]
Kind = Literal["target", "copy", "bystander"]
ScaleRule = Literal["alpha/r", "alpha/sqrt(r)"]
FLOATS = ("float64", "float32", "bfloat16", "float16")
"""The storage dtypes whose rounding is modelled, in `rounding.FORMATS`; a target in any other is inconclusive."""


class Verdict(Enum):
    """Verified < inconclusive < refuted; a report's verdict is the worst of its tensors."""

    VERIFIED = "verified"
    INCONCLUSIVE = "inconclusive"
    REFUTED = "refuted"

    @property
    def exit_code(self) -> int:
        return {"verified": 0, "refuted": 1, "inconclusive": 3}[self.value]

    @property
    def rank(self) -> int:
        return list(Verdict).index(self)


# ---------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMeta:
    """What a header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its data; the width of a dtype is the number in its name, two to a byte where it is packed."""
        width = re.search(r"\d+", self.dtype)
        return self.numel * (max(8, int(width.group())) // 8 if width else 1)


class Checkpoint(Protocol):
    """Named tensors on disk or in memory; opening one reads headers only."""

    @property
    def location(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config.json, or nothing."""
        ...

    def metas(self) -> Mapping[str, TensorMeta]: ...

    def read(self, name: str) -> Tensor:
        """The tensor as stored, without a copy where the format allows: pages are read when touched."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A way for named tensors to lie on disk or in memory; `roles` are the arguments that may lie so."""

    name: str
    recognises: Callable[[Any], bool]
    open: Callable[[Any], Checkpoint]
    roles: tuple[str, ...] = ("base", "adapter", "merged")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """adapter_config.json, parsed once; `unsupported` holds one phrase per feature nobody here can recompute."""

    method: str
    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    in_out: bool | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    token_rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    targets: str | tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    biases: str = "none"
    lora_bias: bool = False
    base_name: str = ""
    producer: str = ""
    unsupported: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One adapter tensor, named: `role` in the formula of `module` (or of the parameter that `module` names)."""

    tensor: str
    module: str
    role: str
    wrapped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An opened adapter: its configuration, its tensors, and what each of them is for."""

    config: AdapterConfig
    checkpoint: Checkpoint
    dialect: str
    parts: tuple[Part, ...]
    orphans: tuple[str, ...] = ()
    foreign_prefix: str = ""
    weight: float = 1.0

    @property
    def location(self) -> str:
        return self.checkpoint.location


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one tool names adapter tensors and writes its configuration."""

    name: str
    recognises: Callable[[Mapping[str, Any], Sequence[str]], bool]
    read: Callable[[Mapping[str, Any], Checkpoint], Adapter]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one convention renames, ties or drops base tensors.

    resolve   (name, names, config) -> the name under which it lies, or None
    drops     (meta, config) -> whether a model of that configuration rebuilds the tensor or has no place for it,
              so that an honest save leaves it out
    """

    name: str
    resolve: Callable[[str, Mapping[str, TensorMeta], Mapping[str, Any]], str | None] | None = None
    drops: Callable[[TensorMeta, Mapping[str, Any]], bool] | None = None


# ------------------------------------------------------------------------------------------------- the formula


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """s = weight * alpha / r, or weight * alpha / sqrt(r) under rsLoRA; keeps its ingredients, faults need them."""

    alpha: float
    rank: int
    rule: ScaleRule = "alpha/r"
    default_alpha: float
    default_rank: int
    weight: float = 1.0

    @property
    def value(self) -> float:
        return self.weight * (self.alpha / (self.rank if self.rule == "alpha/r" else math.sqrt(self.rank)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place a recipe may fit: one base tensor and the adapter parts that name it."""

    parameter: str
    shape: tuple[int, ...]
    roles: Mapping[str, tuple[int, ...]]
    in_out: bool | None = None
    multihead: bool = False


Numbers = Any
"""A Tensor or a Ball: recipes are written once, over whatever supports @ * + / and row slices."""

Factors = Mapping[str, Numbers]
Keep = Callable[[Numbers], Numbers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The formula of a merged tensor, written once over Tensor and Ball alike.

    product   (factors, rows) -> the unscaled delta of those rows; None for recipes that copy
    apply     (w, delta, factors, norms, rows, keep) -> merged rows; None means w + delta.
              `keep` stores an intermediate in the storage dtype where the producer did, else does nothing
    columns   (w, delta, keep) -> rows of the matrix whose column norms `apply` needs, (1, columns); None: it needs none
    replace   (w, factors, rows, tokens) -> rows for recipes that copy
    flipped   product with the two axes of the weight confused; the mistake of LC104
    stored    PEFT stores the delta in the weight's dtype before adding it, whatever safe_merge says
    """

    name: str
    formula: str
    fits: Callable[[Site], bool]
    product: Callable[[Factors, slice], Numbers] | None = None
    apply: Callable[[Numbers, Numbers, Factors, Numbers, slice, Keep], Numbers] | None = None
    columns: Callable[[Numbers, Numbers, Keep], Numbers] | None = None
    replace: Callable[[Numbers, Factors, slice, tuple[int, ...]], Numbers] | None = None
    flipped: Callable[[Factors, slice], Numbers] | None = None
    stored: bool = False

    @property
    def copies(self) -> bool:
        return self.product is None

    @property
    def adds(self) -> bool:
        """Whether W' is W + delta and nothing more."""
        return self.product is not None and self.apply is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One recipe applied by one adapter: factor names, not yet read."""

    recipe: Recipe
    adapter: int
    factors: Mapping[str, str] = field(default_factory=dict)
    scale: Scale | None = None
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """One merged tensor with everything that must have made it, in the order it was made."""

    merged: TensorMeta
    base: TensorMeta | None
    steps: tuple[Step, ...]
    module: str
    undecidable: str = ""

    @property
    def kind(self) -> Kind:
        if any(not step.recipe.copies for step in self.steps):
            return "target"
        return "copy" if any(step.factors for step in self.steps) else "bystander"

    @property
    def recipe(self) -> str:
        names = dict.fromkeys(step.recipe.name for step in self.steps if step.factors)
        return " + ".join(names) or "identity"

    @property
    def adapters(self) -> tuple[int, ...]:
        return tuple(sorted({step.adapter for step in self.steps if step.factors}))

    @property
    def family(self) -> str:
        """The module's own name: 'q_proj' for every model.layers.N.self_attn.q_proj."""
        return self.module.rsplit(".", 1)[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """One tensor whose shape or dtype is not what the base and the adapters say."""

    name: str
    expected: str
    actual: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every tensor of base, adapters and merged, once: paired, missing, extra, reshaped, or an orphan.

    missing    expected names that MERGED lacks           extra    names of MERGED that nothing explains
    reshaped   paired by name, impossible by shape         retyped  stored in another dtype than the base
    orphans    (adapter, tensor) pairs that name nothing in the base
    contradictions  one phrase for each place where an adapter's configuration and its tensors disagree
    idle       targets of an adapter's configuration for which its file has no factors
    skipped    merged tensors that --include and --exclude keep from being read
    dropped    base tensors that MERGED lacks because its model class rebuilds them or has no place for them
    """

    pairings: tuple[Pairing, ...]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    reshaped: tuple[Mismatch, ...] = ()
    retyped: tuple[Mismatch, ...] = ()
    orphans: tuple[tuple[int, str], ...] = ()
    contradictions: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    base_location: str = ""
    base_config: Mapping[str, Any] = field(default_factory=dict)
    merged_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[Pairing, ...]:
        return tuple(pairing for pairing in self.pairings if pairing.kind == "target")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedStep:
    """A step with its factors at hand, as stored."""

    recipe: Recipe
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    scale: Scale | None = None
    tokens: tuple[int, ...] = ()
    flipped: bool = False

    @property
    def s(self) -> float:
        return self.scale.value if self.scale else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The loaded inputs of a pairing. A fault is a changed Case: the same arithmetic replays both.

    base      (rows, columns) as stored; the tensor may lie on disk, only the touched rows are read
    storage   dtype of the merged tensor
    held      the dtype the model had while it was merged, where a mistake changed it (LC120)
    through   a dtype the finished tensor was converted to and back (LC120)
    """

    base: Tensor
    steps: tuple[LoadedStep, ...]
    storage: str
    held: str | None = None
    through: str | None = None

    @property
    def rows(self) -> int:
        return int(self.base.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """One honest order of operations and dtypes.

    says      how a report tells it
    factors   "kept", or rounded to "storage" or "tf32" before the product
    product   the product is rounded to storage, then the scaled product again
    delta     the scaled delta is rounded to storage before the sum: "always", "layer" (where PEFT does), "never"
    load      the dtype of the model while it is merged: that of "merged", that of "base", or one by name
    through   the sum is rounded to this dtype before it is stored
    compute   dtype of products and sums
    fused     one accumulation over base and products, in any order
    """

    name: str
    says: str
    factors: Literal["kept", "storage", "tf32"] = "kept"
    product: bool = False
    delta: Literal["always", "layer", "never"] = "layer"
    load: str = "merged"
    through: str | None = None
    compute: str = "float32"
    fused: bool = False


# ------------------------------------------------------------------------------------------------- the outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was measured on one tensor: numbers, no prose. Squares are sums over all elements.

    over_budget  elements that no honest merge of the best-fitting arithmetic can have written
    worst        largest residual, in units of the budget of its element
    signal       |delta|^2         overlap  <merged - base, delta>      noise  |actual - expected|^2
    vanished     an honest merge writes the base's own bits although the delta is not zero
    """

    tensor: str
    kind: Kind
    recipe: str
    module: str
    adapters: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    verdict: Verdict
    exact: bool
    arithmetic: str | None = None
    over_budget: int = 0
    worst: float = 0.0
    signal: float = 0.0
    overlap: float = 0.0
    noise: float = 0.0
    vanished: bool = False
    nonfinite: int = 0
    code: str | None = None
    variant: str = ""

    @property
    def family(self) -> str:
        return self.module.rsplit(".", 1)[-1]

    @property
    def survival(self) -> float | None:
        """<merged - base, delta> / <delta, delta>: the share of the fine-tune that the stored bits keep."""
        return self.overlap / self.signal if self.kind == "target" and self.signal > 0 else None

    @property
    def residual(self) -> float | None:
        """|actual - expected| / |delta|."""
        return math.sqrt(self.noise / self.signal) if self.kind == "target" and self.signal > 0 else None

    @property
    def snr_db(self) -> float | None:
        """Signal-to-noise ratio of the delta, in dB; None where nothing was lost, or nothing was there."""
        if self.kind != "target" or not self.signal > 0 or not self.noise > 0:
            return None
        return 10 * math.log10(self.signal / self.noise)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One kind of mistake, and where. The message is one lowercase phrase."""

    code: str
    name: str
    severity: Severity
    message: str
    tensors: tuple[str, ...] = ()
    help: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueFault:
    """A forward model of wrong numbers.

    inject    the case as the mistake changed its inputs, one for each way it happens; empty: it cannot happen here
    fit       a mistake with one free number: (case, factor on the delta) -> the changed case; tried last
    summary   what happened, as a phrase: 'merged twice'
    kinds     the kinds of tensor it can happen to
    exchanged replay it with the base and the merged tensor in each other's place
    """

    code: str
    name: str
    severity: Severity
    summary: str
    help: str
    inject: Callable[[Case], tuple[Case, ...]]
    fit: Callable[[Case, float], Case] | None = None
    kinds: tuple[Kind, ...] = ("target",)
    exchanged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFault:
    """A mistake that headers and configurations show; `verdict` is the best a report with it can have."""

    code: str
    name: str
    severity: Severity
    summary: str
    help: str
    detect: Callable[[Plan], Sequence[Finding]]
    verdict: Verdict = Verdict.VERIFIED


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternFault:
    """A mistake seen over many comparisons; its findings take over the tensors of the codes in `absorbs`.

    verdict   the best verdict a report with it can have
    """

    code: str
    name: str
    severity: Severity
    summary: str
    help: str
    detect: Callable[[Plan, Sequence[Comparison]], Sequence[Finding]]
    absorbs: tuple[str, ...] = ()
    verdict: Verdict = Verdict.VERIFIED


Fault = ValueFault | PlanFault | PatternFault


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """The circumstances of a check: what was given, with which versions, at what cost."""

    command: str
    tool: Mapping[str, str]
    base: Mapping[str, Any]
    adapters: tuple[Mapping[str, Any], ...]
    merged: Mapping[str, Any]
    bytes_read: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How independent pieces of work are run.

    run   (function, items, jobs, done) -> results in the order of items; `done` hears of each result as it comes
    """

    name: str
    run: Callable[[Callable[[Any], Any], Sequence[Any], int, Callable[[Any], None]], list[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One sub-command: `configure` declares its arguments, `run` does the deed and returns the exit code."""

    name: str
    summary: str
    configure: Callable[[Any], None]
    run: Callable[[Any], int]

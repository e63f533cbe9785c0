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


Numbers = Any
"""A Tensor or a Ball: recipes are written once, over whatever supports @ * + - / and row slices, and `functions`."""


# ---------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMeta:
    """What a header says of one tensor.

    dtype    of its numbers; of a quantised tensor, the one that they are decoded to
    codes    the quantisation that it is stored in, if any
    sealed   why a tensor in that quantisation can be copied and not be computed with, if so
    packed   bytes of its codes and of all that belongs to them
    unmapped  its file cannot be mapped, so that reading it brings it whole into memory
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    codes: str = ""
    sealed: str = ""
    packed: int | None = None
    unmapped: bool = False

    @property
    def stored_as(self) -> str:
        """What lies in the file: the name of its quantisation, else its dtype."""
        return self.codes or self.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its data; the width of a dtype is the number in its name, two to a byte where it is packed."""
        if self.packed is not None:
            return self.packed
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


class RowSource(Protocol):
    """A tensor of which rows are read when they are asked for, along its first dimension."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any:
        """The torch dtype."""
        ...

    def __getitem__(self, span: slice) -> Tensor: ...


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
    raw: Mapping[str, Any] = field(default_factory=dict)


Span = tuple[int, int, int]
"""Start, stop and step along one axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The part of a stored matrix that a formula reads: some rows, some columns, turned over or not; no data moves.

    moved  what is then done to it, where a tool lays its numbers out in another way: they change places, or zeros come
           between them          size   the shape that it has after that
    """

    rows: Span | None = None
    columns: Span | None = None
    transposed: bool = False
    moved: Callable[[Tensor], Tensor] | None = None
    size: tuple[int, ...] = ()

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the view of a tensor of that shape."""
        if self.moved:
            return self.size
        spans = (self.rows, self.columns, *(None for _ in stored[2:]))
        cut = tuple(len(range(*span)) if span else size for span, size in zip(spans, stored, strict=False))
        return cut[::-1] if self.transposed else cut

    def of(self, stored: Tensor) -> Tensor:
        """The view itself."""
        rows, columns = (slice(*span) if span else slice(None) for span in (self.rows, self.columns))
        cut = stored[rows] if stored.ndim < 2 else stored[rows, columns]
        turned = cut.T if self.transposed else cut
        return self.moved(turned) if self.moved else turned


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One adapter tensor, named: `role` in the formula of `module` (or of the parameter that `module` names).

    A part without a module is shared by all modules of its adapter. `depth` counts PEFT's wrappers in its key.
    """

    tensor: str
    module: str
    role: str
    wrapped: bool = False
    view: View | None = None
    depth: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What add_weighted_adapter is told beside kind and weights, under its names."""

    density: float = 1.0
    majority_sign_method: str = "total"
    svd_rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """How several LoRA adapters become one.

    mix       (tensors, weights, options) -> the combined tensor
    of        what is mixed: A and B apart ("factors"), whole deltas, then cut to the rank ("deltas"), or nothing: the
              factors are laid side by side ("ranks")
    refuses   why it cannot be recomputed; then there is no `mix`
    """

    name: str
    mix: Callable[[Sequence[Numbers], Sequence[float], Options], Numbers] | None = None
    of: Literal["factors", "deltas", "ranks"] = "factors"
    refuses: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An opened adapter: its configuration, its tensors, and what each of them is for.

    members   the adapters that this one combines, each with its weight
    scales    module -> its scale, where the file tells it module by module
    refused   module -> why what the adapter does to it cannot be recomputed
    """

    config: AdapterConfig
    checkpoint: Checkpoint
    dialect: str
    parts: tuple[Part, ...]
    orphans: tuple[str, ...] = ()
    foreign_prefix: str = ""
    weight: float = 1.0
    members: tuple[Adapter, ...] = ()
    scales: Mapping[str, Scale] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def location(self) -> str:
        return self.checkpoint.location


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one tool names adapter tensors and writes its configuration.

    bind         (adapter, BASE) -> the same with its modules named as in BASE, where the tool names them otherwise
    needs_config  nothing can be read of such an adapter without its adapter_config.json
    """

    name: str
    recognises: Callable[[Mapping[str, Any], Sequence[str]], bool]
    read: Callable[[Mapping[str, Any], Checkpoint], Adapter]
    bind: Callable[[Adapter, Checkpoint], Adapter] | None = None
    needs_config: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Rows of a tensor of a file that are rows of a parameter of the loaded model.

    file_rows   start and stop; None: all of the tensor      rows   the same, of the parameter's matrix
    expert      which matrix of a parameter that stacks one for each expert; None: it is no stack, or all of it
    transposed  the file keeps the matrix turned over
    """

    file: str
    memory: str
    file_rows: tuple[int, int] | None = None
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one convention renames, ties, fuses, splits or drops base tensors.

    resolve   (name, names, config) -> the name under which it lies, or None
    links     (names of a file, config) -> which parameters of the loaded model they are, or parts of them
    memory    (name, config) -> the name that a tensor of that name is loaded under
    drops     (meta, config) -> whether a model of that configuration rebuilds the tensor or has no place for it,
              so that an honest save leaves it out
    """

    name: str
    resolve: Callable[[str, Mapping[str, TensorMeta], Mapping[str, Any]], str | None] | None = None
    links: Callable[[Mapping[str, TensorMeta], Mapping[str, Any]], Sequence[Link]] | None = None
    memory: Callable[[str, Mapping[str, Any]], str | None] | None = None
    drops: Callable[[TensorMeta, Mapping[str, Any]], bool] | None = None


class Blocks(Protocol):
    """Which elements of a matrix share a scale; blocks are numbered in the order of their first elements.

    count   how many blocks there are
    of      rows -> for each element of theirs, the number of its block
    whole   how many blocks, counted from the first, lie wholly in the first rows
    """

    @property
    def count(self) -> int: ...
    def of(self, rows: slice) -> Tensor: ...
    def whole(self, rows: int) -> int: ...


class Scales(Protocol):
    """The stored scales of all blocks, judged by how large the largest element of each may honestly be.

    divisors  (low, high) -> least and largest number that an honest quantiser divided by; NaN: it did not
              store this scale
    wrong     (low, high) -> blocks whose scale it did not store, as all blocks together show
    strange   (low, high) -> blocks whose scale follows no known rule
    anew      (low, high) -> the least and the largest divisor, where such blocks are quantised once more
    remade    (low, high) -> the least and the largest scale that is then stored
    """

    def divisors(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]: ...
    def wrong(self, low: Tensor, high: Tensor) -> Tensor: ...
    def strange(self, low: Tensor, high: Tensor) -> Tensor: ...
    def anew(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]: ...
    def remade(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which numbers an honest quantiser can have turned into the codes of one tensor.

    codes     (rows, columns) integers
    levels    code -> the number that it stands for, in units of its block's scale; float64
    least, largest   code -> the ends of what is rounded to it, in units of the divisor, widened by what the quantiser's
              own arithmetic may be off; float64
    dtypes    those that the numbers may have had when they were quantised, the likeliest first
    anew      those that they may have when they are quantised once more
    """

    codes: Tensor
    levels: Tensor
    least: Tensor
    largest: Tensor
    blocks: Blocks
    scales: Scales
    dtypes: tuple[str, ...]
    anew: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """One tensor that a file keeps as codes.

    meta      the tensor as numbers; `sealed` says why it has none
    parts     role -> tensor of the file: the codes, and scales, tables and headers, of which nothing else has any use
    riders    tensors of the file that only a module with codes needs, and that decoding does not read
    facts     what a header or a configuration says of the codes
    """

    meta: TensorMeta
    parts: Mapping[str, str]
    riders: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """How one scheme keeps a tensor as codes, with scales and tables beside them.

    find     (checkpoint) -> the tensors that lie so; headers only, and what a scheme writes into a tensor as a header
    decode   (coded, checkpoint) -> the numbers that the codes stand for, as the scheme's own library computes them, by
             rows; None: they are sealed
    grid     (coded, checkpoint, the same of the base where it lies in the same scheme) -> what an honest quantiser can
             have turned into these codes; None: how it rounds is not modelled
    """

    name: str
    find: Callable[[Checkpoint], Sequence[Coded]]
    decode: Callable[[Coded, Checkpoint], RowSource] | None = None
    grid: Callable[[Coded, Checkpoint, tuple[Coded, Checkpoint] | None], Grid] | None = None


# ------------------------------------------------------------------------------------------------- the formula


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """s = weight * alpha / r, or weight * alpha / sqrt(r) under rsLoRA; keeps its ingredients, faults need them.

    other_alphas   what further patterns that match the module would make of alpha
    """

    alpha: float
    rank: int
    rule: ScaleRule = "alpha/r"
    default_alpha: float
    default_rank: int
    weight: float = 1.0
    other_alphas: tuple[float, ...] = ()

    @property
    def value(self) -> float:
        return self.weight * (self.alpha / (self.rank if self.rule == "alpha/r" else math.sqrt(self.rank)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place a recipe may fit: one base tensor and the adapter parts that name it.

    shape     of the base tensor; for a bias, (out,)
    roles     role -> shape of the adapter tensor
    method    the adapter's peft_type
    leaf      "weight" or "bias": which parameter of the module this is
    settings  what the method's configuration says of this module
    dtype, dtypes   of the base tensor, and of the adapter tensors by role
    """

    parameter: str
    shape: tuple[int, ...]
    roles: Mapping[str, tuple[int, ...]]
    in_out: bool | None = None
    multihead: bool = False
    method: str = "LORA"
    leaf: str = "weight"
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = ""
    dtypes: Mapping[str, str] = field(default_factory=dict)


Factors = Mapping[str, Numbers]


class Hand(Protocol):
    """How the producer of one arithmetic stores what is not yet finished.

    keep      to the model's dtype where this arithmetic rounds intermediates, else not at all
    settle    to the model's dtype, whatever the arithmetic: for formulas that PEFT computes in that dtype
    combined  to the model's dtype where this arithmetic combines several adapters in it, else not at all
    member    the same for the product B A of one of these, before it is scaled
    """

    def keep(self, x: Numbers) -> Numbers: ...
    def settle(self, x: Numbers) -> Numbers: ...
    def combined(self, x: Numbers) -> Numbers: ...
    def member(self, x: Numbers) -> Numbers: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What one PEFT type calls its tensors, and which keys of its configuration change a number.

    name      the peft_type
    roles     end of a tensor's name after its module, without '.weight' and adapter name -> role; a `*` stands for a
              number, which takes the place of the `*` in the role
    shared    name after 'base_model.' of a tensor that the modules share, or one for each module whose path follows
              -> role
    keys      keys of adapter_config.json that are read here or change no merged number; any other that is set makes
              the adapter undecidable
    alpha, rank   the keys of the scale's ingredients; no `alpha`: the formula has no scale
    patterns  rank_pattern and alpha_pattern hold numbers for modules, as LoRA's do
    settings  (adapter_config.json, module, target modules and the shapes of their weights) -> what the recipes need
              to know of one module; raises ValueError with the reason where the files do not tell
    refuses   (adapter_config.json) -> why such an adapter cannot be merged or recomputed, or nothing
    doubts    (site) -> why the files do not tell what becomes of it, or nothing
    contradicts  (site) -> what the configuration says otherwise of these factors, so that PEFT loads none, or nothing
    pruned    (site) -> whether its factors have no elements because training left the module no rank
    changes   the parameters of a target that this method must change: without a recipe for them nothing is decided
    """

    name: str
    roles: Mapping[str, str]
    shared: Mapping[str, str] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    alpha: str = ""
    rank: str = "r"
    patterns: bool = True
    settings: Callable[[Mapping[str, Any], str, Mapping[str, tuple[int, ...]]], Mapping[str, Any]] | None = None
    refuses: Callable[[Mapping[str, Any]], str] | None = None
    doubts: Callable[[Site], str] | None = None
    contradicts: Callable[[Site], str] | None = None
    pruned: Callable[[Site], bool] | None = None
    changes: tuple[str, ...] = ("weight",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The formula of a merged tensor, written once over Tensor and Ball alike.

    method    the PEFT type it belongs to; recipes of one type share one Method; None: LoRA's own
    prepare   (factors, site, hand) -> factors that all rows need, made once: rotations, unpacked cores, looked-up banks
    product   (factors, rows) -> the unscaled delta of those rows; None for recipes that copy or only apply
    scaled    (product, scale) -> the delta, where PEFT does more than multiply by s
    apply     (w, delta, factors, norms, rows, hand) -> merged rows; None means w + delta
    columns   (w, delta, hand) -> rows of the matrix whose column norms `apply` needs, (1, columns); None: it needs none
    replace   (w, factors, rows, tokens) -> rows for recipes that copy
    flipped   product with the two axes of the weight confused; the mistake of LC104
    stored    PEFT stores the delta in the weight's dtype before adding it, whatever safe_merge says
    reads     the base as the adapter found it, as factor "W": its "rows" for `product`, or the "whole" for `prepare`;
              or, "merged", the whole weight as the adapters before it left it, for `prepare`
    companions  role -> leaf: another base tensor of the same module that the formula reads
    carried   roles of which `replace` reads the rows that it is asked for, so that no others are converted
    elementwise  roles that no matrix product reads, so that tensor cores never round them
    stacked   the base is a stack of matrices, whose rows are counted through
    loads     done while the adapter is loaded, before any adapter is merged
    settled   (step, base, merged tensor) -> the step with a choice that no rule fixes and only the merged tensor tells,
              one of finitely many that are equally right: signs of singular vectors
    combines  makes one adapter of several, which a producer may have done in the weight's dtype
    releases  for releases of PEFT with another formula, forward and merge alike: their name -> the step as they take it
    anywhere  the same for what depends on the machine or the release that merges, whichever trained the adapter
    """

    name: str
    formula: str
    fits: Callable[[Site], bool]
    method: Method | None = None
    prepare: Callable[[Factors, Site, Hand], Factors] | None = None
    product: Callable[[Factors, slice], Numbers] | None = None
    scaled: Callable[[Numbers, Scale], Numbers] | None = None
    apply: Callable[[Numbers, Numbers, Factors, Numbers, slice, Hand], Numbers] | None = None
    columns: Callable[[Numbers, Numbers, Hand], Numbers] | None = None
    replace: Callable[[Numbers, Factors, slice, tuple[int, ...]], Numbers] | None = None
    flipped: Callable[[Factors, slice], Numbers] | None = None
    stored: bool = False
    reads: Literal["", "rows", "whole", "merged"] = ""
    companions: Mapping[str, str] = field(default_factory=dict)
    carried: frozenset[str] = frozenset()
    elementwise: frozenset[str] = frozenset({"m", "bias", "S", "rows"})
    stacked: bool = False
    loads: bool = False
    settled: Callable[[LoadedStep, Tensor, Tensor], LoadedStep] | None = None
    combines: bool = False
    releases: Mapping[str, Callable[[LoadedStep], LoadedStep]] = field(default_factory=dict)
    anywhere: Mapping[str, Callable[[LoadedStep], LoadedStep]] = field(default_factory=dict)

    @property
    def copies(self) -> bool:
        return self.replace is not None

    @property
    def adds(self) -> bool:
        """Whether W' is W + delta and nothing more."""
        return self.product is not None and self.apply is None

    @property
    def by_rows(self) -> bool:
        """Whether rows of W' follow from the same rows of W and from the factors."""
        whole = self.prepare or self.columns or self.settled or self.companions or self.reads in ("whole", "merged")
        return self.adds and not whole and not self.loads


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One recipe applied by one adapter: factor names, not yet read.

    views       role -> the part of that factor which the formula reads, where that is not all of it
    companions  role -> base tensor that the formula reads too
    window      start and stop of the only rows that the step touches; None: all
    """

    recipe: Recipe
    adapter: int
    factors: Mapping[str, str] = field(default_factory=dict)
    scale: Scale | None = None
    tokens: tuple[int, ...] = ()
    site: Site | None = None
    views: Mapping[str, View] = field(default_factory=dict)
    companions: Mapping[str, str] = field(default_factory=dict)
    window: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """One merged tensor with everything that must have made it, in the order it was made.

    wanted   the shape that base and adapters give it, where MERGED has another number of rows: the first rows are
             compared, as many as both have; (): its own
    pruned   an adapter has factors of no rank for it: PEFT adds 0 to it, which leaves all but the sign of a zero
    """

    merged: TensorMeta
    base: TensorMeta | None
    steps: tuple[Step, ...]
    module: str
    undecidable: str = ""
    wanted: tuple[int, ...] = ()
    pruned: bool = False

    @property
    def rows(self) -> int | None:
        """How many rows are compared, where that is not all of them."""
        return min(self.wanted[0], self.merged.shape[0]) if self.wanted else None

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
class Spare:
    """Weights that lie in the folder of a checkpoint and were not read as it.

    files     their names
    rival     a widely used loader takes them in place of what was read
    differing () -> the tensors that both have, with other numbers, read when it is asked for; None: they cannot be
              compared, for they have no name in common, or cannot be read
    """

    files: tuple[str, ...]
    rival: bool
    differing: Callable[[], tuple[str, ...] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """What lies in the folder of a checkpoint beside the tensors that were read; nothing of one in memory.

    read        the files that were read
    spares      other weights
    adapter     the file of an adapter
    absent      index that was not read -> files that it names and that are not there
    total_size  what the index that was read says its tensors take
    sides       what a model is used with, by kind: 'a tokenizer' -> the files
    generation  generation_config.json          template  the chat template
    """

    read: tuple[str, ...] = ()
    spares: tuple[Spare, ...] = ()
    adapter: str = ""
    absent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    total_size: int | None = None
    sides: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    template: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every tensor of base, adapters and merged, once: paired, missing, extra, reshaped, or an orphan.

    missing    expected names that MERGED lacks           extra    names of MERGED that nothing explains
    reshaped   paired by name, impossible by shape         retyped  stored in another dtype than the base
    orphans    (adapter, tensor) pairs that name nothing in the base
    contradictions  one phrase for each place where an adapter's configuration and its tensors disagree
    idle       targets of an adapter's configuration for which its file has no factors
    pruned     tensors of MERGED for which an adapter has factors of no rank, that its training left so
    skipped    merged tensors that --include and --exclude keep from being read
    elsewhere  merged tensors that another shard of this check reads
    dropped    base tensors that MERGED lacks because its model class rebuilds them or has no place for them
    computed   tensors of MERGED that BASE lacks because they are computed when a model is built or converted
    untied     output heads that base and adapter keep apart from the embedding
    renamed    name in MERGED -> name in BASE, of what the two call differently
    doubled    heads that MERGED has beside the embedding that they are tied to, and that BASE does not store
    homes      tensor of MERGED -> the name of the file that holds it, where files of one kind are several
    """

    pairings: tuple[Pairing, ...]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    reshaped: tuple[Mismatch, ...] = ()
    retyped: tuple[Mismatch, ...] = ()
    orphans: tuple[tuple[int, str], ...] = ()
    contradictions: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    pruned: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    doubled: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    homes: Mapping[str, str] = field(default_factory=dict)
    missing_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    extra_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()
    base_location: str = ""
    base_config: Mapping[str, Any] = field(default_factory=dict)
    merged_config: Mapping[str, Any] = field(default_factory=dict)
    base_metas: Mapping[str, TensorMeta] = field(default_factory=dict)
    merged_metas: Mapping[str, TensorMeta] = field(default_factory=dict)
    base_folder: Folder = field(default_factory=Folder)
    merged_folder: Folder = field(default_factory=Folder)

    @property
    def targets(self) -> tuple[Pairing, ...]:
        return tuple(pairing for pairing in self.pairings if pairing.kind == "target")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedStep:
    """A step with its factors at hand, as stored; `adapter` counts the adapters from 0."""

    recipe: Recipe
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    scale: Scale | None = None
    tokens: tuple[int, ...] = ()
    flipped: bool = False
    site: Site | None = None
    companions: Mapping[str, Tensor] = field(default_factory=dict)
    window: tuple[int, int] | None = None
    adapter: int = 0

    @property
    def s(self) -> float:
        return self.scale.value if self.scale else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another target with a tensor of the same shape and the same recipe, whose factors may have been mistaken.

    tensor, module   of that target          steps   () -> its steps, loaded when they are asked for
    base             () -> its base tensor, of an embedding or a head that is asked about the other
    """

    tensor: str
    module: str
    steps: Callable[[], tuple[LoadedStep, ...]]
    base: Callable[[], Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The loaded inputs of a pairing. A fault is a changed Case: the same arithmetic replays both.

    base      (rows, columns) as stored; the tensor may lie on disk, only the touched rows are read
    storage   dtype of the merged tensor
    held      the dtype the model had while it was merged, where a mistake changed it (LC120)
    through   a dtype the finished tensor was converted to and back (LC120)
    grid      what the codes of the merged tensor allow, where it is quantised
    name      of the merged tensor            module   that it belongs to
    config    the config.json of BASE
    peers     the other targets that it may have been mistaken for
    codes     () -> what BASE holds in place of the numbers, where it is quantised
    told      what a mistake has to say of the way in which it was made here: evidence of its finding
    resized   the tensor of BASE where it has another shape; zeros stand in for it as `base`, as they do where BASE
              has none
    tied      the tensor that a configuration can tie to this one: a head's embedding, an embedding's head
    unsigned  +0 stands for -0, in the base and in what is written
    """

    base: Tensor
    steps: tuple[LoadedStep, ...]
    storage: str
    held: str | None = None
    through: str | None = None
    grid: Grid | None = None
    name: str = ""
    module: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    peers: tuple[Peer, ...] = ()
    codes: Callable[[], Tensor] | None = None
    told: Mapping[str, Any] = field(default_factory=dict)
    resized: Tensor | None = None
    tied: Peer | None = None
    unsigned: bool = False

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
    compute   dtype of products and sums; "storage": that of the model, each result rounded to it
    fused     one accumulation over base and products, in any order
    prescaled the scale is multiplied into one factor, and that factor stored, before the product
    combined  what several adapters are combined to, step by step: "kept", or rounded to "storage", or so are the
              "products" of each one's factors too, before they are scaled
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
    prescaled: bool = False
    combined: Literal["kept", "storage", "products"] = "kept"


# ------------------------------------------------------------------------------------------------- the outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was measured on one tensor: numbers, no prose. Squares are sums over all elements.

    over_budget  elements that no honest merge of the best-fitting arithmetic can have written; at least so many
    worst        largest residual, in units of the budget of its element
    signal       |delta|^2         overlap  <merged - base, delta>      noise  |actual - expected|^2
    vanished     an honest merge writes the base's own bits although the delta is not zero
    blurred      the budget is as large as the delta: nothing is proved by keeping within it
    strange      blocks of a quantised tensor whose scale follows no known rule: the codes fit it, and it proves nothing
    release      the releases of PEFT whose formula this is, where it is not today's
    told         what the mistake named by `code` has to say of this tensor; of codes that nothing decodes, whether they
                 are those of BASE
    beyond       what there is past the rows that were compared, where that is not all of them
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
    blurred: bool = False
    strange: int = 0
    nonfinite: int = 0
    code: str | None = None
    variant: str = ""
    release: str = ""
    told: Mapping[str, Any] = field(default_factory=dict)
    beyond: str = ""

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

    inject    the case as the mistake changed its inputs, one for each way it happens, the commonest first; empty: it
              cannot happen here
    fit       a mistake with one free number: (case, factor on the delta) -> the changed case; tried after these
    recognise  a mistake that cannot be replayed, for its inputs are not at hand: (case, merged tensor) -> evidence
              that it was made, or None; asked last, of what nothing reproduces
    summary   what happened, as a phrase: 'merged twice'
    tell      evidence of each tensor -> the same phrase with what the evidence adds to it
    kinds     the kinds of tensor it can happen to
    exchanged replay it with the base and the merged tensor in each other's place
    causes    its entries in docs/diagnosis.md: 'M12'
    """

    code: str
    name: str
    severity: Severity
    summary: str
    help: str
    inject: Callable[[Case], tuple[Case, ...]]
    fit: Callable[[Case, float], Case] | None = None
    recognise: Callable[[Case, Tensor], Mapping[str, Any] | None] | None = None
    tell: Callable[[Sequence[Mapping[str, Any]]], str] | None = None
    kinds: tuple[Kind, ...] = ("target",)
    exchanged: bool = False
    causes: tuple[str, ...] = ()


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
    causes: tuple[str, ...] = ()


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
    causes: tuple[str, ...] = ()


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

    run     (function, items, jobs, done) -> results in the order of items; `done` hears of each item with its result
            as it comes, in any order, and in the process that asked
    remote  items go to other processes: they and the function are pickled, so inputs have to be locations
    close   lets go of what one run keeps for the next
    """

    name: str
    run: Callable[[Callable[[Any], Any], Sequence[Any], int, Callable[[Any, Any], None]], list[Any]]
    remote: bool = False
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One sub-command: `configure` declares its arguments, `run` does the deed and returns the exit code.

    exits   what its exit codes say, where they are not those of a verdict
    """

    name: str
    summary: str
    configure: Callable[[Any], None]
    run: Callable[[Any], int]
    exits: str = ""

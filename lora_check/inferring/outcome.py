"""The nouns of `infer`: what became of each tensor, and of all of them. Numbers, no prose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from lora_check.rounding import MOST


class Kind(Enum):
    """What kind of change a tensor shows.

    OPEN is a matrix whose spectrum is not seen to end: what of it stands above the noise is too little to be FULL.
    """

    COPY = "copy"
    LOW_RANK = "low-rank"
    OPEN = "open"
    FULL = "full"
    ROWS = "rows"
    RESCALED = "rescaled"
    RESCALED_LOW_RANK = "rescaled-low-rank"
    VECTOR = "vector"
    NEW = "new"
    FAINT = "faint"
    UNCLEAR = "unclear"

    @property
    def is_told(self) -> bool:
        """Whether this says what happened."""
        return self not in (Kind.FAINT, Kind.UNCLEAR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What one tensor of MERGED is beside that of BASE; squares are sums over all elements.

    tensor      its name; with [e], the matrix of one expert of a stack
    rank        directions that stand above the noise of storing; of OPEN and FULL, the least that there have to be
    hidden      directions after them that are too weak for the floor, and stronger than rounding explains; of LOW_RANK
    stores      times that a sum was stored, as far as the noise tells; of LOW_RANK
    certain     how many of them stand above a bound that leaves nothing out
    energy      |D|^2        noise     |E|^2 that storing leaves behind, in the mean
    margins     singular values of D over the floor of the noise, falling, once rows and columns are weighed so that the
                noise is about the same everywhere; as many as were looked at
    values      singular values of what stands above the noise, falling
    because     why nothing can be told, or what was told beside the kind
    rows        that changed, of ROWS; that were added, of NEW
    """

    tensor: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    rank: int = 0
    certain: int = 0
    hidden: int = 0
    stores: int = 1
    energy: float = 0.0
    noise: float = 0.0
    changed: int = 0
    margins: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    rows: int = 0
    because: str = ""

    @property
    def module(self) -> str:
        """The tensor without what it is of its module, and without the expert of a stack."""
        name = self.tensor.partition("[")[0]
        return name.removesuffix(".weight").removesuffix(".bias")

    @property
    def family(self) -> str:
        """The last word of the module's name."""
        return self.module.rsplit(".", 1)[-1]

    @property
    def is_bias(self) -> bool:
        """By the name."""
        return self.tensor.endswith("bias")

    @property
    def is_norm(self) -> bool:
        """By the name: nothing but that tells a norm from another vector."""
        return not self.is_bias and any(word in self.family.lower() for word in ("norm", "ln_", "ln1", "ln2"))

    @property
    def snr_db(self) -> float | None:
        """10 log10(|delta|^2 / |E|^2), |delta|^2 being what of D the noise does not explain."""
        signal = self.energy - self.noise
        return 10 * math.log10(signal / self.noise) if signal > 0 and self.noise > 0 else None

    @property
    def margin(self) -> float | None:
        """The weakest direction that counts, in units of the floor."""
        return self.margins[self.rank - 1] if 0 < self.rank <= len(self.margins) else None

    @property
    def gap(self) -> float | None:
        """The weakest direction that counts, in units of the next one."""
        known = 0 < self.rank < len(self.margins) and self.margins[self.rank] > 0
        return self.margins[self.rank - 1] / self.margins[self.rank] if known else None

    @property
    def confidence(self) -> str:
        """certain: every direction is above the bound, and none is hidden; likely: not so; none: nothing is told."""
        if not self.kind.is_told:
            return "none"
        low = self.kind is Kind.LOW_RANK
        return "likely" if self.kind is Kind.OPEN or (low and (self.certain < self.rank or self.hidden)) else "certain"

    @property
    def ends(self) -> bool:
        """Whether this is of low rank, and no direction was seen between the last and the noise."""
        return self.kind is Kind.LOW_RANK and not self.hidden

    @property
    def shares(self) -> tuple[float, ...]:
        """Which share of |D|^2 each direction that counts has."""
        return tuple(value**2 / self.energy for value in self.values) if self.energy else ()

    def as_dict(self) -> dict[str, Any]:
        """One line of the JSON."""
        return {
            "name": self.tensor,
            "kind": self.kind.value,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "changed": self.changed,
            "rank": self.rank,
            "certain": self.certain,
            "hidden": self.hidden,
            "stores": self.stores,
            "confidence": self.confidence,
            "margin": self.margin,
            "gap": self.gap,
            "norm": math.sqrt(self.energy) if math.isfinite(self.energy) else None,
            "noise": math.sqrt(self.noise) if math.isfinite(self.noise) else None,
            "snr_db": self.snr_db,
            "margins": list(self.margins),
            "singular_values": list(self.values),
            "shares": list(self.shares),
            "rows": self.rows,
            "because": self.because,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """What MERGED is.

    missing, extra   names that only BASE has, only MERGED has
    base, merged     location, tensors, bytes and dtypes of each
    """

    changes: tuple[Change, ...]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    base: Mapping[str, Any] = field(default_factory=dict)
    merged: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def of(self, *kinds: Kind) -> tuple[Change, ...]:
        """The changes of these kinds."""
        return tuple(one for one in self.changes if one.kind in kinds)

    @property
    def is_whole(self) -> bool:
        """Whether every matrix changed, and vectors too: adapters leave most of a model alone."""
        matrices = (one for one in self.changes if len(one.shape) > 1)
        return all(one.kind is not Kind.COPY for one in matrices) and bool(self.of(Kind.VECTOR))

    @property
    def endless(self) -> tuple[Change, ...]:
        """Matrices whose last direction was not seen, of high rank or low."""
        return tuple(one for one in self.of(Kind.FULL, Kind.OPEN, Kind.LOW_RANK) if not one.ends)

    @property
    def is_full(self) -> bool:
        """Whether this is a full fine-tune: by the rank of most matrices, or as all of the model moved without an end.

        The numbers of a full fine-tune may be of low rank in a matrix or two, above the noise: Adam's first steps are
        about as large everywhere, so in a coarse dtype their weak directions are lost. All of a model is not.
        """
        low, between, full = (self.of(kind) for kind in (Kind.LOW_RANK, Kind.OPEN, Kind.FULL))
        rescaled = self.of(Kind.RESCALED, Kind.RESCALED_LOW_RANK)
        if full and len(full) >= len(low) + len(between) + len(rescaled):
            return True
        ended = sum(one.ends for one in low)
        return self.is_whole and bool(between or full) and len(self.endless) > ended

    @property
    def is_lora(self) -> bool:
        """Whether this is a LoRA merge: in most matrices the spectrum ends, in most of them at the same rank.

        Where a spectrum sinks into the noise, its rank is that of the noise, and so another in each matrix. Where all
        of a model moved and is of low rank, a step of plain descent on a few tokens may have written it.
        """
        low, full = self.of(Kind.LOW_RANK), self.of(Kind.FULL)
        if not low or self.is_full or (self.is_whole and not full) or len(low) <= len(self.of(Kind.FULL, Kind.OPEN)):
            return False
        alike = Counter(one.rank for one in low).most_common(1)[0][1]
        return min(alike, sum(one.ends for one in low)) > MOST * len(low)

    @property
    def untold(self) -> tuple[Change, ...]:
        """What changed, and is not told: how, or, but for the whole of the model, whether of low rank or in full."""
        kinds = (Kind.FAINT, Kind.UNCLEAR) if self.is_full else (Kind.FAINT, Kind.UNCLEAR, Kind.OPEN)
        return self.of(*kinds)

    @property
    def exit_code(self) -> int:
        """0: every tensor has been told; 3: something could not be."""
        return 3 if self.untold else 0

    @property
    def families(self) -> dict[str, tuple[Change, ...]]:
        """Family -> its tensors, in the order of the file; biases apart."""
        groups: dict[str, list[Change]] = {}
        for one in self.changes:
            groups.setdefault(f"{one.family} (bias)" if one.is_bias else one.family, []).append(one)
        return {name: tuple(members) for name, members in groups.items()}

"""How fast a pass was, and what kept it from being faster. Nothing here decides a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Bound = Literal["storage", "memory", "compute"]

BINDS = 0.8
"""The share of its time or of its rate from which something counts as what the rest waits for. A pass has a beginning
and an end in which not everything is at work, and a ceiling is measured in a moment: below four fifths it was something
else, such as cores that others used; above, more of it would have made the pass faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """What one pass over both models took.

    size         bytes of both models that were read
    seconds      of the pass                cpu_seconds     of all workers in it, without those of the readers
    workers      that ran at once
    cold         bytes that came from a device    cold_seconds    in which a reader waited for them
    memory_rate  bytes a second at which these files can be read when they lie in memory; None: not measured
    """

    size: int
    seconds: float
    cpu_seconds: float
    workers: int
    cold: int = 0
    cold_seconds: float = 0.0
    memory_rate: float | None = None

    @property
    def rate(self) -> float:
        """Bytes of both models a second."""
        return self.size / self.seconds if self.seconds > 0 else 0.0

    @property
    def ceiling(self) -> float | None:
        """Bytes a second at which they could be read as they lay: what was cold by the device, the rest from memory."""
        if not self.memory_rate:
            return None
        return self.size / (self.cold_seconds + max(0, self.size - self.cold) / self.memory_rate)

    @property
    def bound(self) -> Bound | None:
        """What was at work nearly all the time; None: nothing was, so something outside held it up."""
        shares = {"storage": self._share(self.cold_seconds), "compute": self._share(self.cpu_seconds / self.workers)}
        busiest = max(shares, key=lambda name: shares[name])
        if shares[busiest] < BINDS:
            return None
        if busiest == "storage":
            return "storage"
        return "memory" if self.memory_rate and self.rate >= BINDS * self.memory_rate else "compute"

    def _share(self, seconds: float) -> float:
        return seconds / self.seconds if self.seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The keys of a report's summary."""
        return {
            "cpu_seconds": round(self.cpu_seconds, 3),
            "gb_per_second": _gb(self.rate),
            "read_ceiling_gb_per_second": _gb(self.ceiling),
            "bound": self.bound,
        }


def speed(one: Throughput | None) -> dict[str, Any]:
    """The keys of a pass; null each where nothing timed it."""
    nothing = Throughput(size=0, seconds=0.0, cpu_seconds=0.0, workers=1)
    return one.as_dict() if one else dict.fromkeys(nothing.as_dict())


def _gb(rate: float | None) -> float | None:
    return None if rate is None else round(rate / 1e9, 3)

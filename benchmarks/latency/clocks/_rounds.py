"""Rounds of calls, and how many of them make one sample."""

from __future__ import annotations

import math

from benchmarks.latency.nouns import Place, Timed
from benchmarks.latency.place import wall

LEAST = 2e-3
"""Seconds of one sample at least: waiting for the device at its end takes the host some 10 us, 0.5 % of that."""
WARM = 3
"""Rounds before the first sample, unless one alone lasts that long: every call has been made before, by the gate."""


def rounds(timed: Timed, many: int) -> None:
    """Call every copy in turn, `many` times."""
    for _ in range(many):
        for call in timed.calls:
            call()


def repeats(timed: Timed, place: Place) -> int:
    """Warm up, and count the rounds that last LEAST seconds."""
    for _ in range(WARM):
        lasted = wall(place, lambda: rounds(timed, 1))
        if lasted > LEAST:
            break
    return max(1, math.ceil(LEAST / max(lasted, 1e-9)))

"""The pace of an eager loop: host seconds of calls back to back between two idle moments of the device.

On a GPU it is the slower of the host, which queues the kernels, and the device, which runs them. A timer that puts work
of its own before the first call would let the host run ahead and hide the launches: here nothing is queued before.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.latency.clocks._rounds import repeats, rounds
from benchmarks.latency.nouns import Clock, Place, Timed
from benchmarks.latency.place import wall


def prepare(timed: Timed, place: Place) -> Callable[[], float]:
    """Warm up; measure as many rounds in a row as one sample needs."""
    many = repeats(timed, place)

    def once() -> float:
        return wall(place, lambda: rounds(timed, many)) / (many * len(timed.calls))

    return once


CLOCK = Clock(
    name="eager_wall",
    about="host seconds of a loop of calls, from an idle device to an idle device",
    place=3,
    prepare=prepare,
)

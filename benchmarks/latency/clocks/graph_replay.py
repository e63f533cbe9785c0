"""A CUDA graph of whole rounds, replayed: the device at its own pace, without the host, but with its gaps.

Rounds are captured until the graph is long enough for a sample, so that starting the graph counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.latency.clocks._rounds import LEAST, repeats
from benchmarks.latency.nouns import Clock, Place, Timed
from benchmarks.latency.place import captured, synchronise

NODES = 4096
"""Calls in one graph at most: more only make it slow to build."""


def prepare(timed: Timed, place: Place) -> Callable[[], float]:
    """Warm up, capture, replay once; then events before and after a replay, on its stream.

    raises   RuntimeError: a call cannot be captured
    """
    many = max(1, min(repeats(timed, place), NODES // len(timed.calls)))
    calls = timed.calls * many
    replay, _ = captured(calls, place)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replays(times: int) -> float:
        synchronise(place)
        before.record()
        for _ in range(times):
            replay()
        after.record()
        synchronise(place)
        return before.elapsed_time(after) * 1e-3 / times

    replay()
    times = max(1, round(LEAST / max(replays(1), 1e-9)))
    return lambda: replays(times) / len(calls)


def missing(place: Place) -> str:
    """Only CUDA has such graphs."""
    return "" if place.kind == "cuda" else "a CPU has no graphs to replay"


CLOCK = Clock(
    name="graph_replay",
    about="device seconds of a CUDA graph of the calls, replayed",
    place=2,
    prepare=prepare,
    missing=missing,
)

"""Seconds in which the device worked: the sum of the durations of all kernels, copies and fills of a call.

On a GPU the profiler tells them, one by one; gaps between kernels are not counted, and of kernels that run at the same
time each counts. On a CPU it is the processor time of the calling thread: what other processes take is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.latency.clocks._rounds import repeats, rounds
from benchmarks.latency.nouns import Clock, Place, Timed
from benchmarks.latency.place import synchronise


class Profiled:
    """Measures a round of copies under the profiler; `kernels` of one call are known after the first."""

    def __init__(self, timed: Timed, place: Place) -> None:
        self.timed, self.place = timed, place
        self.kernels: int | None = None

    def __call__(self) -> float:
        """Mean seconds of all that ran on the device for one call.

        raises   RuntimeError: the profiler saw nothing
        """
        synchronise(self.place)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            rounds(self.timed, 1)
            synchronise(self.place)
        lasted = durations(profile, torch.autograd.DeviceType.CUDA)
        if not lasted:
            raise RuntimeError("the profiler saw no kernel: it may not be allowed here")
        self.kernels = round(len(lasted) / len(self.timed.calls))
        return sum(lasted) / len(self.timed.calls)


def durations(profile: torch.profiler.profile, kind: torch.autograd.DeviceType) -> list[float]:
    """Seconds of every event on a kind of device.

    They are taken as the profiler has them: `profile.events()` makes a Python object with forty fields of each, which
    takes longer than a model's forward.
    """
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    return [one.duration_ns() * 1e-9 for one in events if one.device_type() == kind and not one.is_user_annotation()]


def prepare(timed: Timed, place: Place) -> Callable[[], float]:
    """Warm up; the profiler too, whose first use is slow."""
    many = repeats(timed, place)
    if place.kind == "cuda":
        profiled = Profiled(timed, place)
        profiled()
        return profiled

    def once() -> float:
        began = time.thread_time()
        rounds(timed, many)
        return (time.thread_time() - began) / (many * len(timed.calls))

    return once


CLOCK = Clock(
    name="device_busy",
    about="seconds in which kernels ran; on a CPU, processor time of the thread",
    place=1,
    prepare=prepare,
)

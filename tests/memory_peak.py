"""Measure the private memory of a check: how far RssAnon rises above what it was once everything had been imported.

PYTHONPATH=. python tests/memory_peak.py BASE ADAPTER [ADAPTER ...] MERGED
PYTHONPATH=. python tests/memory_peak.py < REQUESTS     one a line, JSON: {"small": locations, "large": locations}

The same check over a small model comes first, so that its imports are not counted. Pages of mapped files are not
private, whatever their number: the kernel takes them back when it likes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

PAUSE = 0.001


def measured(small: Sequence[str], large: Sequence[str], *, whole: bool = False) -> dict[str, Any]:
    """Bytes that the check of `large` takes at the most, its verdict and the codes of its findings.

    whole   let no checkpoint offer rows, so that what has to be decoded or put together is whole in memory
    """
    _check(small)
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        _checked(large, theirs, whole)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        before = peak = int(pipe.readline() or b"0")
        while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            peak = max(peak, private(child))
            time.sleep(PAUSE)
        os.waitpid(child, 0)
        told = json.loads(pipe.read() or b'{"verdict": "died"}')
    return {"peak": peak - before, **told}


def _checked(large: Sequence[str], pipe: int, whole: bool) -> None:
    """The large check in a process of its own, which ends with it."""
    try:
        if whole:
            from lora_check import sources

            sources.offered = lambda checkpoint, name: None
        os.write(pipe, b"%d\n" % private(os.getpid()))
        report = _check(large)
        told = {"verdict": report.verdict.value, "codes": [one.code for one in report.findings]}
        os.write(pipe, json.dumps(told).encode())
    finally:
        sys.stderr.flush()
        os._exit(0)


def _check(locations: Sequence[str]) -> Any:
    import lora_check

    base, *adapters, merged = locations
    return lora_check.check(base, adapters, merged, jobs=1)


def private(process: int) -> int:
    """Bytes of a process that no file holds; 0 once it has ended."""
    try:
        with open(f"/proc/{process}/status") as status:
            found = [line.split()[1] for line in status if line.startswith("RssAnon:")]
    except ProcessLookupError:
        return 0
    return int(found[0]) << 10 if found else 0


if __name__ == "__main__":
    asked = [{"small": sys.argv[1:], "large": sys.argv[1:]}] if sys.argv[1:] else map(json.loads, sys.stdin)
    for one in asked:
        print(json.dumps(measured(**one)), flush=True)

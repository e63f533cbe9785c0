"""lora_check: proves or refutes, from the files alone, that a merged checkpoint is base + LoRA adapter.

report = lora_check.check(base, adapters, merged)      locations, state dicts or modules
report.verdict, report.findings, report.comparisons, report.as_dict()
lora_check.assert_merged(base, adapters, merged)       in a test suite
lora_check.merge(base, adapters, out)                  writes what `check` expects
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from lora_check.errors import LoraCheckError
from lora_check.report import Report
from lora_check.types import Finding, Verdict

if TYPE_CHECKING:
    from lora_check.merging import Merged

__all__ = ["Finding", "LoraCheckError", "Report", "Verdict", "assert_merged", "check", "merge"]


def check(
    base: Any,
    adapters: Any,
    merged: Any,
    *,
    weights: Sequence[float] | None = None,
    combination: str | None = None,
    device: str = "cpu",
    jobs: int | None = None,
    candidate_bases: Sequence[Any] = (),
    candidate_adapters: Sequence[Any] = (),
) -> Report:
    """Recompute what every tensor of `merged` must be, compare, and name the mistakes.

    base, merged   a location (folder, file, hub id), a state dict or an nn.Module
    adapters       one adapter, or a sequence of them, merged one after the other
    weights        a factor on each adapter's scale
    jobs           worker threads; None: one for each core at hand
    candidate_bases, candidate_adapters   tried in the place of `base` or of each adapter where the report is not
                   verified; findings LC406 and LC407 tell which fit, and the verdict stays
    raises         LoraCheckError: an input cannot be read
    """
    from lora_check import pipeline

    return pipeline.check(
        base,
        adapters,
        merged,
        weights=weights,
        combination=combination,
        device=device,
        jobs=jobs,
        candidate_bases=candidate_bases,
        candidate_adapters=candidate_adapters,
    )


def assert_merged(base: Any, adapters: Any, merged: Any, **options: Any) -> None:
    """Raise AssertionError, carrying the text report, unless `merged` is verified. Options are those of `check`."""
    report = check(base, adapters, merged, **options)
    if report.verdict is not Verdict.VERIFIED:
        from lora_check import registry
        from lora_check.report import Style

        raise AssertionError(registry.load("renderers")["text"].render(report, Style()))


def merge(
    base: Any,
    adapters: Any,
    out: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    combination: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    arithmetic: str = "fp32-add",
    jobs: int | None = None,
) -> Merged:
    """Write what `check` expects of base and adapters to a new folder, in a few MiB of memory.

    out              a folder that is not there yet; it appears when all of it is on the disk
    dtype            of every floating tensor, as if the base had been loaded in it; None: the base's own
    max_shard_size   bytes, or text such as "5GB"; None: the base's own files
    arithmetic       "fp32-add" is PEFT's merge_and_unload, "rounded-delta" its safe_merge
    raises           LoraCheckError: an input cannot be read or merged, or the folder not written
    """
    from lora_check import merging

    return merging.merge(
        base,
        adapters,
        out,
        weights=weights,
        combination=combination,
        dtype=dtype,
        max_shard_size=max_shard_size,
        arithmetic=arithmetic,
        jobs=jobs,
    )

"""The opened files and a pairing -> its Case and the merged tensor.

Only the rows that are asked for are read, where that can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_check.items import by_lines, loaded_whole
from lora_check.quantised import Stored, grid_of, stored_as
from lora_check.rounding import FORMATS
from lora_check.sources import matrix, rows_of, unsigned_zeros
from lora_check.types import Adapter, Case, Checkpoint, Grid, LoadedStep, Pairing, Step


@dataclass(frozen=True, slots=True)
class Files:
    """The opened base, adapters and merged checkpoint."""

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    merged: Checkpoint

    def in_codes(self, pairing: Pairing) -> tuple[Stored | None, Stored | None]:
        """How the base tensor and the merged one are quantised, if they are."""
        ours = stored_as(self.base, pairing.base.name) if pairing.base else None
        return ours, stored_as(self.merged, pairing.merged.name)

    def by_rows(self, pairing: Pairing) -> tuple[Case, Any]:
        """As `load`, for who sees nothing but rows: of stacks, those of all matrices."""
        return self._lying(pairing, stacked=by_lines(pairing))

    def seen(self, pairing: Pairing) -> tuple[Case, Any]:
        """A case and the merged tensor, of which rows will be read: nothing else of them, where that can be."""
        return self.load(pairing) if loaded_whole(pairing) else self.by_rows(pairing)

    def load(self, pairing: Pairing) -> tuple[Case, Any]:
        """The case of a pairing and the merged tensor, both as matrices whose rows are the first dimension.

        Of what has to be decoded or put together, rows are made when they are asked for, where that can be.
        """
        stacked = any(step.recipe.stacked for step in pairing.steps)
        return self._held(pairing) if loaded_whole(pairing) else self._lying(pairing, stacked=stacked)

    def _lying(self, pairing: Pairing, *, stacked: bool) -> tuple[Case, Any]:
        assert pairing.base is not None, pairing.merged.name
        grid = self.grid(pairing)
        stacked = stacked or grid is not None
        base: Any = matrix(self.base, pairing.base.name, stacked)
        actual: Any = matrix(self.merged, pairing.merged.name, stacked)
        unsigned = _unsigned(pairing, grid)
        if unsigned:
            base, actual = unsigned_zeros(base), unsigned_zeros(actual)
        steps, storage = self.steps(pairing), pairing.merged.dtype
        return Case(base=base, steps=steps, storage=storage, grid=grid, unsigned=unsigned), actual

    def _held(self, pairing: Pairing) -> tuple[Case, Tensor]:
        """The tensors themselves."""
        steps, grid = self.steps(pairing), self.grid(pairing)
        stacked = grid is not None or any(step.recipe.stacked for step in steps)
        actual = rows_of(self.merged.read(pairing.merged.name), stacked)[: pairing.rows]
        found = base = rows_of(self.base.read(pairing.base.name), stacked)[: pairing.rows] if pairing.base else None
        if base is None or base.shape != actual.shape:
            # What an adapter brings whole, in a shape of its own, has no base: zeros that take no memory.
            base = torch.zeros((1, 1), dtype=actual.dtype if base is None else base.dtype).expand(actual.shape)
        unsigned = _unsigned(pairing, grid)
        if unsigned:
            base, actual = base + 0, actual + 0
        if len(steps) == 1 and steps[0].recipe.settled and grid is None and pairing.base:
            steps = (steps[0].recipe.settled(steps[0], base, actual),)
        resized = found if found is not None and found.shape != actual.shape else None
        storage = pairing.merged.dtype
        return Case(base=base, steps=steps, storage=storage, grid=grid, resized=resized, unsigned=unsigned), actual

    def grid(self, pairing: Pairing) -> Grid | None:
        """What an honest quantiser can have made of the merged tensor, if it lies in codes."""
        ours, theirs = self.in_codes(pairing)
        return grid_of(theirs, ours) if theirs and theirs.coded.meta.codes else None

    def _step(self, step: Step) -> LoadedStep:
        checkpoint = self.adapters[step.adapter].checkpoint
        factors = {role: checkpoint.read(name) for role, name in step.factors.items()}
        return LoadedStep(
            recipe=step.recipe,
            factors=factors | {role: view.of(factors[role]) for role, view in step.views.items()},
            scale=step.scale,
            tokens=step.tokens,
            site=step.site,
            companions={role: self.base.read(name) for role, name in step.companions.items()},
            window=step.window,
            adapter=step.adapter,
        )

    def steps(self, pairing: Pairing) -> tuple[LoadedStep, ...]:
        """The steps of a pairing with their factors."""
        return tuple(self._step(step) for step in pairing.steps)

    def rows_of_base(self, name: str) -> Tensor:
        """A tensor of BASE as a matrix."""
        return rows_of(self.base.read(name))


def _unsigned(pairing: Pairing, grid: Grid | None) -> bool:
    """Whether -0 of a bystander is as good as +0: libraries decode it to either, and PEFT may have added 0 to it."""
    if pairing.base is None or pairing.steps or grid is not None:
        return False
    return bool(pairing.base.codes) or (pairing.pruned and {pairing.base.dtype, pairing.merged.dtype} <= FORMATS.keys())

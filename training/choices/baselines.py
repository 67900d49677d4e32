"""FFN channels and key-value groups as a comparison needs them: at random, and by the size of their weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pat_serve.cut.axes import AXES
from pat_serve.families.family import Family
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.training.choices.base import ModelChoice
from pat_serve.training.model.group_scores import GroupScores, members


class Random(ModelChoice):
    """Any indices, by the run's seed."""

    name: ClassVar[str] = "random"

    def importance(
        self, model: Any, family: Family, sizes: ModelSizes, batches: Sequence[dict[str, Tensor]], axes: Collection[str]
    ) -> dict[str, Tensor]:
        """Give uniform numbers."""
        # Draws of its own: a run that is resumed reads its choice, and draws none.
        draws = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        return {axis: torch.rand(sizes.layers, AXES[axis].length(sizes), generator=draws) for axis in sorted(axes)}


class Magnitude(ModelChoice):
    """The sum of squares of an index's weights, which no data change."""

    name: ClassVar[str] = "magnitude"

    @torch.no_grad()
    def importance(
        self, model: Any, family: Family, sizes: ModelSizes, batches: Sequence[dict[str, Tensor]], axes: Collection[str]
    ) -> dict[str, Tensor]:
        """Sum w^2."""
        scores = GroupScores(sizes, axes)
        for name, spec, layer in members(family, sizes, axes):
            scores.add(spec, layer, model.get_submodule(name).weight.float().square())
        return scores.totals

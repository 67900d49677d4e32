"""Cuts of any axes at random."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pat_serve.cut.axes import AXES
from pat_serve.cut.cuts import Cuts
from pat_serve.shapes.sizes import ModelSizes


def random_cuts(base: ModelSizes, counts: Mapping[str, int], seed: int = 0) -> Cuts:
    """Random indices of these counts, other ones in every layer where an axis lets layers choose.

    Args:
        base: sizes of the base.
        counts: to keep, by axis.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, count in counts.items():
        axis = AXES[name]
        for line in [f"{name}.{i}" for i in range(base.layers)] if axis.per_layer else [name]:
            kept[line] = torch.randperm(axis.length(base), generator=generator)[:count].sort().values
    return Cuts.of(base, kept)

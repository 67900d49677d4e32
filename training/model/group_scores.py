"""Scores of FFN channels and key-value groups: a number for each weight, summed over all weights of an index.

An FFN channel is a row of the gate's and of the up projection, and a column of the down projection. A key-value group
is its rows of the key and value projections, those of its query heads, and the columns that read them.

Shape suffixes: L layers, I indices of an axis, O outputs, N inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from pat_serve.cut.axes import AXES
from pat_serve.families.family import Family, TensorSpec
from pat_serve.shapes.sizes import ModelSizes


def members(family: Family, sizes: ModelSizes, axes: Collection[str]) -> Iterator[tuple[str, TensorSpec, int]]:
    """Every linear with a dimension along one of the axes: its name, its line in the table and its layer."""
    for name, spec, layer in family.modules(sizes.layers):
        if layer is not None and len(spec.dims) == 2 and set(axes) & {piece.axis for dim in spec.dims for piece in dim}:
            yield name, spec, layer


class GroupScores:
    """Sums over the weights of each index, by axis.

    Args:
        sizes: of the model.
        axes: that are scored.
    """

    def __init__(self, sizes: ModelSizes, axes: Collection[str]) -> None:
        self.sizes = sizes
        self.totals = {axis: torch.zeros(sizes.layers, AXES[axis].length(sizes), dtype=torch.float64) for axis in axes}

    def add(self, spec: TensorSpec, layer: int, score_ON: Tensor, *, signed: bool = False) -> None:
        """Add a linear's scores.

        Args:
            spec: its line in the table.
            layer: its number.
            score_ON: a score of every weight.
            signed: scores of one row (or column) cancel, and the size of their sum counts.
        """
        for dimension, dim in enumerate(spec.dims):
            if not self.totals.keys() & {piece.axis for piece in dim}:
                continue
            summed = score_ON.sum(1 - dimension, dtype=torch.float64)
            summed = summed.abs() if signed else summed
            start = 0
            for piece in dim:
                length, block = piece.length(self.sizes), piece.block(self.sizes)
                if piece.axis in self.totals:
                    mine = summed[start : start + length].view(-1, block).sum(1)
                    self.totals[piece.axis][layer] += mine.cpu()
                start += length

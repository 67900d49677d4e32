"""Zeros for one linear, as pure maths: its mask, refined or not, and what makes up for it, in blocks of columns.

SparseGPT's order (arXiv 2301.00774): columns before a block are frozen, and what the block loses is made up for by the
columns from its first on. MRP (arXiv 2410.15567) chooses and makes up for entries together (M) and not one by one (S).

Shape suffixes: I inputs, O outputs, B inputs of a block, M entries of a group, R inputs from the block's first on,
N outputs at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pat_serve.cut.pattern import Pattern
from pat_serve.training.sparse.dsnot import refine
from pat_serve.training.sparse.masks import (
    least_joint_error,
    lowest,
    lowest_of_groups,
    magnitudes,
    obs_scores,
    wanda_scores,
)
from pat_serve.training.sparse.removal import DAMPING, joint_steps, single_steps, upper_factor

Mask = Literal["magnitude", "wanda", "S", "M"]
Compensation = Literal["none", "S", "M"]
# The published width of a block.
BLOCK = 128
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class Zeroing:
    """How a linear's zeros are made.

    Attributes:
        pattern: that they have.
        sparsity: share of zeros; of an N:M pattern its own.
        mask: "magnitude" and "wanda" see the dense weight; "S" takes the entries that cost least one by one, and "M"
            the set of a group that costs least together.
        compensation: of the error: "S" column after column, "M" a block's entries together.
        dsnot: refine the mask so that the mean output changes less.
        damping: share of the mean diagonal that is added to the inputs' second moment.
        block: columns of a block.
    """

    pattern: Pattern
    sparsity: float
    mask: Mask
    compensation: Compensation
    dsnot: bool = False
    damping: float = DAMPING
    block: int = BLOCK


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Moments of a linear's inputs over the calibration tokens, float32.

    Attributes:
        second_II: E[x x^T].
        mean_I: E[x].
    """

    second_II: Tensor
    mean_I: Tensor

    def error(self, change_OI: Tensor) -> float:
        """Mean squared error of the output under a change of the weight, summed over the outputs."""
        # By rows, since the product of a 7B model's down_proj in float64 is 360 MB.
        pieces = torch.split(change_OI, _ROWS_AT_ONCE)
        return sum(float(((piece_NI @ self.second_II) * piece_NI).double().sum()) for piece_NI in pieces)


def zeroed(weight_OI: Tensor, inputs: Inputs, how: Zeroing) -> Tensor:
    """The weight with its zeros, float32.

    Args:
        weight_OI: in any dtype; a row has as many entries as the pattern's groups divide.
        inputs: of the linear, on the same device.
        how: the settings.
    """
    weight_OI = weight_OI.to(torch.float32, copy=True)
    second_II = inputs.second_II
    # An input that is always zero: its weights do nothing, and go first.
    dead_I = second_II.diagonal() <= 0
    if dead_I.any():
        second_II = second_II.clone()
        second_II.diagonal()[dead_I] = second_II.diagonal().mean().clamp(min=1e-12)
        weight_OI[:, dead_I] = 0
    wants_factor = how.compensation != "none" or how.mask in ("S", "M")
    factor_II = upper_factor(second_II, how.damping) if wants_factor else None
    removed_OI = None
    if how.compensation == "none" or how.dsnot or how.mask in ("magnitude", "wanda"):
        removed_OI = _mask_of_the_dense(weight_OI, inputs, factor_II, how)
    if how.dsnot:
        assert removed_OI is not None
        removed_OI = refine(removed_OI, weight_OI, inputs.mean_I, inputs.second_II.diagonal(), how.pattern)
    if how.compensation == "none":
        assert removed_OI is not None
        return weight_OI.masked_fill_(removed_OI, 0)
    assert factor_II is not None
    return _compensated(weight_OI, factor_II, removed_OI, how)


def _mask_of_the_dense(weight_OI: Tensor, inputs: Inputs, factor_II: Tensor | None, how: Zeroing) -> Tensor:
    """The whole mask from the weight as it is."""
    pattern = how.pattern
    if how.mask == "M":
        assert factor_II is not None
        width = pattern.group
        pieces = [
            # From a group on, U's rows are those of the inverse with the groups before it frozen.
            least_joint_error(weight_OI[:, at : at + width], factor_II[at : at + width, at : at + width], pattern)
            for at in range(0, weight_OI.shape[1], width)
        ]
        return torch.cat(pieces, dim=1)
    if how.mask == "S":
        assert factor_II is not None
        scores_OI = obs_scores(weight_OI, factor_II)
    elif how.mask == "wanda":
        scores_OI = wanda_scores(weight_OI, inputs.second_II.diagonal())
    else:
        scores_OI = magnitudes(weight_OI)
    if pattern.group:
        return lowest_of_groups(scores_OI, pattern)
    # Wanda compares within a row; a magnitude or an error means the same in all rows.
    return lowest(scores_OI, how.sparsity, by_row=how.mask == "wanda")


def _compensated(weight_OI: Tensor, factor_II: Tensor, removed_OI: Tensor | None, how: Zeroing) -> Tensor:
    """Block after block: choose, unless the mask is given, make up for it, and freeze the block."""
    width = how.block // how.pattern.group * how.pattern.group if how.pattern.group else how.block
    steps_of = joint_steps if how.compensation == "M" else single_steps
    for start in range(0, weight_OI.shape[1], width):
        block_OB = weight_OI[:, start : start + width]
        factor_BR = factor_II[start : start + width, start:]
        factor_BB = factor_BR[:, : block_OB.shape[1]]
        if removed_OI is not None:
            removed_OB = removed_OI[:, start : start + width]
        elif how.pattern.group:
            removed_OB = _groups_of_a_block(block_OB, factor_BB, how)
        else:
            removed_OB = lowest(obs_scores(block_OB, factor_BB), how.sparsity, by_row=False)
        weight_OI[:, start:] -= steps_of(block_OB, factor_BB, removed_OB) @ factor_BR
        # A view of the weight: what is removed is exactly zero and no small number.
        block_OB.masked_fill_(removed_OB, 0)
    return weight_OI


def _groups_of_a_block(weight_OB: Tensor, factor_BB: Tensor, how: Zeroing) -> Tensor:
    """A block's mask, group after group, each on what the groups before it have left."""
    left_OB, width = weight_OB.clone(), how.pattern.group
    steps_of = joint_steps if how.compensation == "M" else single_steps
    pieces = []
    for at in range(0, weight_OB.shape[1], width):
        group_OM, factor_MR = left_OB[:, at : at + width], factor_BB[at : at + width, at:]
        factor_MM = factor_MR[:, :width]
        if how.mask == "M":
            removed_OM = least_joint_error(group_OM, factor_MM, how.pattern)
        else:
            removed_OM = lowest_of_groups(obs_scores(group_OM, factor_MM), how.pattern)
        pieces.append(removed_OM)
        left_OB[:, at:] -= steps_of(group_OM, factor_MM, removed_OM) @ factor_MR
    return torch.cat(pieces, dim=1)

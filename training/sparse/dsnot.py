"""Refine a mask without any training: swap entries so that the mean of each output changes less (arXiv 2310.08915).

A row's error is e = sum over removed entries of w_j E[x_j]. While it is above the threshold, the removed entry that
lowers |e| and has the largest |w_j E[x_j]| / Var[x_j] comes back. The kept entry of the least Wanda score goes whose
part in the mean has the other sign. In an N:M pattern the entry that goes is one of the same group, of either sign. A
swap counts only if |e| falls, so no row gets worse, and else the next entry is tried; the published code lets the last
swap of a row overshoot.

The published threshold of 0.1 is for sums over 2,048 tokens; this one is for means over tokens.

Shape suffixes: I inputs, O outputs, A rows at work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pat_serve.cut.pattern import Pattern
from pat_serve.training.sparse.masks import wanda_scores

MOST_SWAPS = 50
THRESHOLD = 0.1 / 2048
# Rows at a time: scores of 512 rows of 11,008 entries are 23 MB.
ROWS_AT_ONCE = 512


def refine(
    removed_OI: Tensor,
    weight_OI: Tensor,
    mean_I: Tensor,
    energies_I: Tensor,
    pattern: Pattern,
    most_swaps: int = MOST_SWAPS,
) -> Tensor:
    """A mask of the same pattern and of the same count of zeros in each row.

    Args:
        removed_OI: True where an entry is removed; not changed.
        weight_OI: the dense weight.
        mean_I: E[x].
        energies_I: E[x_j^2].
        pattern: of the mask.
        most_swaps: of a row.
    """
    variance_I = (energies_I - mean_I.square()).clamp(min=1e-12)
    refined = [
        _refine_rows(removed_OI[at : at + ROWS_AT_ONCE].clone(), weight_OI[at : at + ROWS_AT_ONCE], mean_I, variance_I,
                     wanda_scores(weight_OI[at : at + ROWS_AT_ONCE], energies_I), pattern, most_swaps)
        for at in range(0, len(weight_OI), ROWS_AT_ONCE)
    ]  # fmt: skip
    return torch.cat(refined)


def mean_errors(removed_OI: Tensor, weight_OI: Tensor, mean_I: Tensor) -> Tensor:
    """e of every row (O,): the dense output's mean less the sparse one's."""
    return (weight_OI * mean_I * removed_OI).sum(1)


def _refine_rows(
    removed: Tensor,
    weight: Tensor,
    mean_I: Tensor,
    variance_I: Tensor,
    scores: Tensor,
    pattern: Pattern,
    most_swaps: int,
) -> Tensor:
    parts = weight * mean_I
    comes_back = parts.abs() / variance_I
    errors_O = mean_errors(removed, weight, mean_I)
    # An entry moves once: what has come back stays, and what has gone stays away.
    moved = torch.zeros_like(removed)
    rows = (errors_O.abs() > THRESHOLD).nonzero()[:, 0]
    for _ in range(most_swaps):
        if not len(rows):
            break
        at = torch.arange(len(rows), device=rows.device)
        signs_A = errors_O[rows].sign()[:, None]
        free = ~moved[rows]
        helps = removed[rows] & free & (parts[rows] * signs_A > 0)
        grown_A = torch.where(helps, comes_back[rows], -torch.inf).argmax(1)
        may_go = ~removed[rows] & free
        if pattern.group:
            group_I = torch.arange(weight.shape[1], device=rows.device) // pattern.group
            may_go &= group_I == group_I[grown_A][:, None]
        else:
            may_go &= parts[rows] * signs_A < 0
        gone_A = torch.where(may_go, scores[rows], torch.inf).argmin(1)
        after_A = errors_O[rows] - parts[rows, grown_A] + parts[rows, gone_A]
        possible = helps[at, grown_A]
        # An entry whose swap does not help is passed over from now on.
        moved[rows[possible], grown_A[possible]] = True
        better = possible & may_go[at, gone_A] & (after_A.abs() < errors_O[rows].abs())
        swapped, grown_A, gone_A = rows[better], grown_A[better], gone_A[better]
        removed[swapped, grown_A], removed[swapped, gone_A] = False, True
        moved[swapped, gone_A] = True
        errors_O[swapped] = after_A[better]
        rows = rows[possible]
        rows = rows[errors_O[rows].abs() > THRESHOLD]
    return removed

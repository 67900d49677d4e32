"""Which entries of a weight are removed, as pure maths: by magnitude, Wanda's or OBS's score, or a joint error.

Shape suffixes: I inputs, O outputs, B inputs of a block, M entries of a group, P removed entries of a group.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from pat_serve.cut.pattern import Pattern


def magnitudes(weight_OI: Tensor) -> Tensor:
    """Score |w|, which sees no data."""
    return weight_OI.abs()


def wanda_scores(weight_OI: Tensor, energies_I: Tensor) -> Tensor:
    """Score |w_j| |x_j| (arXiv 2306.11695).

    Args:
        weight_OI: the weight.
        energies_I: E[x_j^2].
    """
    return weight_OI.abs() * energies_I.clamp(min=0).sqrt()


def obs_scores(weight_OB: Tensor, factor_BB: Tensor) -> Tensor:
    """Score w_j^2 / G_jj: the error when one entry goes and all others make up for it.

    Args:
        weight_OB: some columns.
        factor_BB: U's rows and columns of these, G = U^T U.
    """
    return weight_OB.square() / factor_BB.square().sum(0)


def lowest(scores_OI: Tensor, sparsity: float, *, by_row: bool) -> Tensor:
    """True for the share of the entries that score lowest: of every row, or of all rows together."""
    flat = scores_OI if by_row else scores_OI.reshape(1, -1)
    count = round(sparsity * flat.shape[1])
    removed = torch.zeros_like(flat, dtype=torch.bool)
    removed.scatter_(1, torch.topk(flat, count, dim=1, largest=False).indices, True)
    return removed.view_as(scores_OI)


def lowest_of_groups(scores_OI: Tensor, pattern: Pattern) -> Tensor:
    """True for the M - N entries of every group that score lowest."""
    rows, inputs = scores_OI.shape
    groups = scores_OI.reshape(rows, inputs // pattern.group, pattern.group)
    removed = torch.zeros_like(groups, dtype=torch.bool)
    lowest_first = torch.topk(groups, pattern.group - pattern.kept, dim=2, largest=False).indices
    return removed.scatter_(2, lowest_first, True).view(rows, inputs)


def least_joint_error(weight_OM: Tensor, factor_MM: Tensor, pattern: Pattern) -> Tensor:
    """True for the entries of a group whose removal together leaves the least error E(P) (arXiv 2410.15567).

    Every set of M - N entries is tried: 6 for 2:4.

    Args:
        weight_OM: the group's columns.
        factor_MM: U's rows and columns of the group, G = U^T U.
        pattern: N:M.
    """
    inverse_MM = factor_MM.T @ factor_MM
    sets = torch.tensor(list(combinations(range(pattern.group), pattern.group - pattern.kept)), device=weight_OM.device)
    errors = []
    for removed_P in sets:
        weight_OP = weight_OM[:, removed_P]
        solved_PO = torch.linalg.solve(inverse_MM[removed_P][:, removed_P], weight_OP.T)
        errors.append((weight_OP * solved_PO.T).sum(1))
    chosen_OP = sets[torch.stack(errors).argmin(0)]
    return torch.zeros_like(weight_OM, dtype=torch.bool).scatter_(1, chosen_OP, True)

"""The cost of removing entries of a weight when the others make up for it, as pure maths (arXiv 2410.15567).

With H = E[x x^T] of a linear's inputs, G = H^-1, and P the entries that are removed from a row w, the least mean
squared error of the row's output and the change of the row that reaches it are

    E(P) = w_P (G_PP)^-1 w_P^T        dw = -w_P (G_PP)^-1 G_P,:

The same equations hold for one set P of all rows, which is a cut of input channels (`training/choices/refit.py`), and
for a set of each row, which is a pattern of zeros.

With the columns before `start` frozen, H is that of the columns from there on. Its inverse needs no further inversion:
where G = U^T U with U upper triangular, it is U[start:, start:]^T U[start:, start:].

Shape suffixes: I inputs, O outputs, P removed inputs, B inputs of a block, R inputs from the block's first on.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A share of the mean diagonal of H; the published 1 %.
DAMPING = 0.01
# Rows whose systems are solved at a time: 512 systems of 128 unknowns are 34 MB.
ROWS_AT_ONCE = 512


def removal_error(weight_OI: Tensor, inverse_II: Tensor, removed: slice | Tensor) -> Tensor:
    """E(P) of each row (O,) where all rows lose the same entries.

    Args:
        weight_OI: the weight.
        inverse_II: G.
        removed: the entries, as a slice or int64 indices.
    """
    weight_OP = weight_OI[:, removed]
    solved_PO: Tensor = torch.linalg.solve(inverse_II[removed][:, removed], weight_OP.T)
    return (solved_PO * weight_OP.T).sum(0)


def remove(weight_OI: Tensor, inverse_II: Tensor, removed: slice | Tensor) -> tuple[Tensor, Tensor]:
    """The weight after all rows lost the same entries and the others made up for it, and G of what is left.

    Both have zeros where an entry has gone. The arguments are those of `removal_error`.
    """
    step_PI = torch.linalg.solve(inverse_II[removed][:, removed], inverse_II[removed])
    weight_OI = weight_OI - weight_OI[:, removed] @ step_PI
    inverse_II = inverse_II - inverse_II[:, removed] @ step_PI
    weight_OI[:, removed] = 0
    inverse_II[removed] = 0
    inverse_II[:, removed] = 0
    return weight_OI, inverse_II


def upper_factor(second_II: Tensor, damping: float = DAMPING) -> Tensor:
    """U, upper triangular with U^T U = (H + damping * mean diagonal)^-1, in H's dtype.

    Where rounding leaves H + damping without a factor, the damping grows tenfold.

    Args:
        second_II: H. An input that is zero on all data must have been given a diagonal of its own.
        damping: a share of the mean diagonal.
    """
    diagonal_I = second_II.diagonal().clone()
    share = damping
    while True:
        # One matrix beside H: the factor, the inverse and its factor take each other's place (485 MB for a 7B model's
        # down_proj).
        matrix_II = second_II.clone()
        matrix_II.diagonal().copy_(diagonal_I + share * diagonal_I.mean())
        failed = torch.empty((), dtype=torch.int32, device=matrix_II.device)
        torch.linalg.cholesky_ex(matrix_II, out=(matrix_II, failed))
        if not failed:
            torch.cholesky_inverse(matrix_II, out=matrix_II)
            torch.linalg.cholesky_ex(matrix_II, upper=True, out=(matrix_II, failed))
        if not failed:
            return matrix_II
        assert share < 1, "a second moment without a factor: it is not finite"
        share *= 10


def joint_steps(weight_OB: Tensor, factor_BB: Tensor, removed_OB: Tensor) -> Tensor:
    """The cost of all removed entries of a block together: s (O, B), whose squares sum up to E(P) of each row.

    The change of the columns from the block's first on is -s U[block, start:].

    Args:
        weight_OB: the block's columns.
        factor_BB: U's rows and columns of the block.
        removed_OB: True where an entry is removed.
    """
    inverse_BB = factor_BB.T @ factor_BB
    multipliers_OB = torch.zeros_like(weight_OB)
    # Each row lists its removed entries first, and all rows list as many as the row with the most has.
    most = int(removed_OB.sum(1).max())
    places_OP = removed_OB.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    for at in range(0, len(weight_OB) if most else 0, ROWS_AT_ONCE):
        places = places_OP[at : at + ROWS_AT_ONCE]
        removed = removed_OB[at : at + ROWS_AT_ONCE].gather(1, places).to(weight_OB)
        # Where an entry stays, its equation is that its multiplier is zero.
        system_OPP = inverse_BB[places[:, :, None], places[:, None, :]] * removed[:, :, None] * removed[:, None, :]
        system_OPP.diagonal(dim1=1, dim2=2).add_(1 - removed)
        wanted_OP1 = (weight_OB[at : at + ROWS_AT_ONCE].gather(1, places) * removed)[:, :, None]
        solved_OP = torch.cholesky_solve(wanted_OP1, torch.linalg.cholesky(system_OPP))[:, :, 0]
        multipliers_OB[at : at + ROWS_AT_ONCE].scatter_(1, places, solved_OP)
    return multipliers_OB @ factor_BB.T


def single_steps(weight_OB: Tensor, factor_BB: Tensor, removed_OB: Tensor) -> Tensor:
    """The same where one column goes after the other and those before it are frozen (OBS, as in arXiv 2301.00774).

    The arguments are those of `joint_steps`.
    """
    left_OB, steps_OB = weight_OB.clone(), torch.empty_like(weight_OB)
    for column in range(weight_OB.shape[1]):
        step_O = left_OB[:, column] * removed_OB[:, column] / factor_BB[column, column]
        left_OB[:, column:] -= step_O[:, None] * factor_BB[column, column:]
        steps_OB[:, column] = step_O
    return steps_OB

"""How a tied head survives a rotation of the stream, as pure maths: what is left out of it, and the last norm's gain.

With E the tied embedding, g the last norm's gain and Q a rotation, the turned model's head should be E diag(g) Q, and
its embedding is E Q. They are one tensor only where diag(g) commutes with Q, so where g is constant on all channels
that Q mixes. The gain of most channels is nearly that. The few whose gain is not, and whose part in the logits is
large, are left out of the rotation and stay as they are; on the others the gain is made constant. What that and the cut
leave of the logits is then fitted with the one freedom that the tie leaves: the last norm's gain on the kept channels.

Shape suffixes: D hidden_size, K kept channels, V vocabulary, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pat_serve.cut.rotation import ROWS_AT_ONCE, principal_axes

# Channels that a rotation leaves alone, and the share of a narrow stream that they are at most.
ALONE = 64
_LARGEST_SHARE = 8
# A share of each diagonal entry: a channel that is hardly read keeps about the gain that it begins with.
_RIDGE = 1e-3


def column_energies(weight_VD: Tensor) -> Tensor:
    """Sums of squares of a weight's columns, float64 (D,)."""
    total_D = torch.zeros(weight_VD.shape[1], dtype=torch.float64, device=weight_VD.device)
    for piece in torch.split(weight_VD.detach(), ROWS_AT_ONCE):
        total_D += piece.float().square().sum(0).double()
    return total_D.cpu()


def gain_of_the_turned(gain_D: Tensor, energies_D: Tensor, columns_D: Tensor) -> tuple[Tensor, Tensor]:
    """Which channels a rotation leaves alone, and the gain that they and the others have then.

    Args:
        gain_D: the last norm's effective gain.
        energies_D: second moments of what it multiplies.
        columns_D: sums of squares of the head's columns.

    Returns:
        int64 channels, ascending; and the gain (D,), which is constant on the others.
    """
    felt_D = energies_D * columns_D
    error_D = felt_D * (gain_D - gain_D.median()).square()
    alone = torch.sort(error_D, descending=True, stable=True).indices[: min(ALONE, len(gain_D) // _LARGEST_SHARE)]
    alone = alone.sort().values
    others = _others(alone, len(gain_D))
    # The constant that changes the logits least, were their channels independent.
    constant = (felt_D * gain_D)[others].sum() / felt_D[others].sum()
    turned_D = torch.full_like(gain_D, float(constant))
    turned_D[alone] = gain_D[alone]
    return alone, turned_D


def axes_beside(metric_DD: Tensor, alone: Tensor) -> tuple[Tensor, Tensor]:
    """The principal axes of all channels but some, which stay where they are.

    Args:
        metric_DD: positive semidefinite, float64.
        alone: int64 channels that are axes of their own.

    Returns:
        rotation (D, D) float64, orthogonal, the turned axes with the strongest first; and its columns' importance (D,):
        their shares of the whole, of those left alone more than of any other.
    """
    width = len(metric_DD)
    others = _others(alone, width)
    axes, shares = principal_axes(metric_DD[others][:, others])
    rotation_DD = torch.eye(width, dtype=torch.float64)
    rotation_DD[others[:, None], others] = axes
    importance_D = metric_DD.diagonal() / metric_DD.trace()
    importance_D[others] = shares * importance_D[others].sum()
    importance_D[alone] = importance_D[alone].clamp(min=1.001 * float(importance_D[others].max()))
    return rotation_DD, importance_D


def fitted_gain(head_VD: Tensor, mixed_DD: Tensor, xz_DK: Tensor, zz_KK: Tensor, kept_K: Tensor) -> Tensor:
    """The last norm's gain with which a tied head gives the dense logits best, by least squares.

    With A = E[:, kept] the head as it is and W = E M the dense one, the logits' error |A diag(s) z - W x|^2, summed
    over tokens, is least for (A^T A o zz) s = diag(A^T W xz): K numbers, and V only in one product.

    Args:
        head_VD: E, the (turned) embedding.
        mixed_DD: M, such that E M is the dense model's head for x: Q^T diag(g) Q.
        xz_DK: sum over tokens of x z^T, x the dense and z the cut stream, normalized, float64.
        zz_KK: sum of z z^T, float64.
        kept_K: int64: the channels of z.

    Returns:
        the effective gain (D,) float64; M's diagonal, which a channel that is hardly read stays near to, for what is
        not kept.
    """
    device = zz_KK.device
    gram_DD = torch.zeros(head_VD.shape[1], head_VD.shape[1], dtype=torch.float64, device=device)
    for piece in torch.split(head_VD.detach(), ROWS_AT_ONCE):
        gram_DD += (piece.float().T @ piece.float()).double()
    wanted_K = ((gram_DD[kept_K] @ mixed_DD) * xz_DK.T).sum(1)
    system_KK = gram_DD[kept_K][:, kept_K] * zz_KK
    ridge_K = system_KK.diagonal() * _RIDGE
    # Where a channel is never read, any number above zero lets the factor exist.
    ridge_K = torch.where(ridge_K > 0, ridge_K, ridge_K.mean().clamp(min=1e-12))
    fitted_D = mixed_DD.diagonal().clone()
    lacks_K = wanted_K - system_KK @ fitted_D[kept_K]
    factor_KK = torch.linalg.cholesky(system_KK + ridge_K.diag())
    fitted_D[kept_K] += torch.cholesky_solve(lacks_K[:, None], factor_KK)[:, 0]
    return fitted_D


def _others(alone: Tensor, width: int) -> Tensor:
    return torch.ones(width, dtype=torch.bool).index_fill_(0, alone, False).nonzero()[:, 0]

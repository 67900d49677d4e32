"""The best linear with fewer inputs, as pure maths: least squares on moments, whole or at a low rank.

Shape suffixes: N tokens, I inputs of the dense linear, K those that stay, O outputs, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A share of the mean diagonal of E[z z^T], added to it: channels may be nearly dependent.
RIDGE = 1e-3
# A share of each input's own power, times inputs over tokens. It holds the weights back where the tokens are few.
SHRINKAGE = 4.0


class Moments:
    """Sums of z z^T and y z^T over tokens, float64, of inputs z and of what is wanted y, and the number of tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self.zz_II: Tensor | None = None
        self.yz_OI: Tensor | None = None

    def add(self, y_NO: Tensor, z_NI: Tensor) -> None:
        """Add the tokens of a batch: outputs (N, O) as they should be, and inputs (N, I)."""
        z_NI = z_NI.float()
        self.tokens += len(z_NI)
        zz_II, yz_OI = (z_NI.T @ z_NI).double(), (y_NO.float().T @ z_NI).double()
        self.zz_II = zz_II if self.zz_II is None else self.zz_II + zz_II
        self.yz_OI = yz_OI if self.yz_OI is None else self.yz_OI + yz_OI

    def second(self) -> Tensor:
        """E[z z^T] times the number of tokens (I, I)."""
        assert self.zz_II is not None
        return self.zz_II

    def change(
        self, now_OK: Tensor, kept_K: Tensor | None = None, *, shrinkage: float = SHRINKAGE
    ) -> tuple[Tensor, Tensor]:
        """How weights should change to give y from the kept entries of z (O, K), and the lower factor F (K, K).

        The change is (y z^T - W z z^T) (z z^T + R)^-1 with W the weights that there are, and F F^T = z z^T + R. R is
        diagonal: an entry has `shrinkage` * K / N of its own power, and a little. So each input's part in y is held
        where it is, the more firmly the fewer tokens there are: a ridge regression of the change (Hoerl and Kennard,
        1970), for which the scale of an input makes no difference. A ridge on the weights themselves would draw them
        to zero, and without one few tokens' noise becomes weights.

        Args:
            now_OK: W.
            kept_K: int64; None for all.
            shrinkage: how firmly, as a guess of the part of y that no change explains over the part that one does.
        """
        zz_KK, yz_OK = self.second(), self.yz_OI
        assert yz_OK is not None
        if kept_K is not None:
            kept_K = kept_K.to(zz_KK.device)
            zz_KK, yz_OK = zz_KK[kept_K][:, kept_K], yz_OK[:, kept_K]
        else:
            zz_KK = zz_KK.clone()
        lacks_OK = torch.addmm(yz_OK, now_OK.to(zz_KK), zz_KK, alpha=-1)
        power_K = zz_KK.diagonal()
        # Where nothing is ever read, any number above zero lets the factor exist.
        least = RIDGE * float(power_K.mean()) or 1.0
        power_K.mul_(1 + shrinkage * len(power_K) / self.tokens).add_(least)
        factor_KK = torch.linalg.cholesky(zz_KK)
        return torch.cholesky_solve(lacks_OK.T, factor_KK).T, factor_KK


def low_rank_update(felt_OK: Tensor, factor_KK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (O, R) and (R, K) whose product is nearest to a change of weights, felt by inputs of a second moment.

    The nearest is by ||(change - B A) F|| with F F^T = E[z z^T], whichever the root F, so a singular value
    decomposition in the whitened space; both factors get the same norm.

    Args:
        felt_OK: the change of the weights times F, float32.
        factor_KK: F, the lower Cholesky factor, float64.
        rank: R.
    """
    left_OR, values_R, right_KR = torch.svd_lowrank(felt_OK, q=min(rank + 8, *felt_OK.shape), niter=4)
    left_OR, right_KR = left_OR[:, :rank] * values_R[:rank].sqrt(), right_KR[:, :rank] * values_R[:rank].sqrt()
    a_RK = torch.linalg.solve_triangular(factor_KK, right_KR.T.double(), upper=False, left=False).float()
    balance = (a_RK.norm() / left_OR.norm()).sqrt()
    return left_OR * balance, a_RK / balance

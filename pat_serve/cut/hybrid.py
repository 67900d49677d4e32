"""The Hybrid Sparsification Module as pure maths: what training applies, parity repeats and export folds.

Shape suffixes: D hidden_size, R rank of the hybrid identity operator, K kept channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# The least scale of an embedding that stays tied: the final norm's gain takes the inverse of the scale.
LEAST_SCALE = 0.1


@dataclass(frozen=True, kw_only=True)
class HybridFold:
    """The operator T = diag(s) (I + L1 L0) on one residual writer, to be folded into its weight (PAT, section 3.2).

    Attributes:
        l0_RD: the first low-rank factor; of rank 0 where T is to be diagonal, as on an embedding that stays tied.
        l1_DR: the second low-rank factor.
        scale_D: the trainable scale s.
    """

    l0_RD: Tensor
    l1_DR: Tensor
    scale_D: Tensor

    def __post_init__(self) -> None:
        rank, hidden = self.l0_RD.shape
        assert self.l1_DR.shape == (hidden, rank)
        assert self.scale_D.shape == (hidden,)

    @property
    def rank(self) -> int:
        """R; 0 for a diagonal operator."""
        return len(self.l0_RD)

    def to(self, dtype: torch.dtype) -> HybridFold:
        """The same operator in another dtype."""
        return HybridFold(l0_RD=self.l0_RD.to(dtype), l1_DR=self.l1_DR.to(dtype), scale_D=self.scale_D.to(dtype))


def apply_hybrid(x: Tensor, fold: HybridFold, gate_D: Tensor) -> Tensor:
    """y = s * g * (x + L1 L0 x), the output of one HSM.

    Args:
        x: activations of shape (..., D).
        fold: the operator, in any dtype; the low-rank path runs in x's.
        gate_D: the shared gate, in [0, 1.5]; exactly 0 or 1 once the mask is frozen.

    Returns:
        activations of shape (..., D) in x's dtype, zero wherever the gate is.
    """
    if fold.rank:
        x = x + F.linear(F.linear(x, fold.l0_RD.to(x.dtype)), fold.l1_DR.to(x.dtype))
    # A scale near 1 would move in steps of 0.004 in bfloat16, so the product is taken in the scale's own dtype.
    return (x * (fold.scale_D * gate_D)).to(x.dtype)

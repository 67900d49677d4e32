"""The three regularisers that PAT adds to the cross-entropy, as pure functions of tensors.

Source: PAT (arXiv 2408.14721), section 3.3 and 3.4. A channel counts as kept when its logit is >= 0, in every loss, in
the metrics and at the freeze alike: at the start, all logits 0, everything is kept, as the open gate says.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

COUNT_WEIGHT = 10.0
TARGET_LOGIT = 0.5


def kept_channels(logits_D: Tensor) -> Tensor:
    """Boolean (D,): the channels that the mask keeps at present."""
    return logits_D.detach() >= 0


def count_loss(logits_D: Tensor, target_width: int) -> Tensor:
    """10 * |number of kept channels - K| / K, with a straight-through gradient into every logit.

    Args:
        logits_D: mask logits (D,).
        target_width: K.
    """
    hard_D = kept_channels(logits_D).to(logits_D.dtype)
    straight_through_D = hard_D + logits_D - logits_D.detach()
    return COUNT_WEIGHT * (straight_through_D.sum() - target_width).abs() / target_width


def push_loss(logits_D: Tensor) -> Tensor:
    """Mean of (m - 0.5)^2 over kept channels plus mean of (m + 0.5)^2 over the others; an empty set adds 0."""
    kept_D = kept_channels(logits_D)
    total = logits_D.new_zeros(())
    for selected_D, target in ((kept_D, TARGET_LOGIT), (~kept_D, -TARGET_LOGIT)):
        # This asks the device for no number, for which the host would have to wait.
        squares_D = torch.where(selected_D, (logits_D - target).square(), 0.0)
        total = total + squares_D.sum() / selected_D.sum().clamp(min=1)
    return total


def identity_loss(l0_factors: Iterable[Tensor]) -> Tensor:
    """Sum over ALL modules of mse(L0 L0^T, I): the rows of every L0 stay orthonormal, and scale is left to s.

    A sum, not a mean: each module feels the published weight of 1 however many there are.

    Args:
        l0_factors: (R, D) each, at least one.
    """
    terms = []
    for l0_RD in l0_factors:
        gram_RR = l0_RD @ l0_RD.T
        terms.append(F.mse_loss(gram_RR, torch.eye(len(gram_RR), dtype=gram_RR.dtype, device=gram_RR.device)))
    return torch.stack(terms).sum()

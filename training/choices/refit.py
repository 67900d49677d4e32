"""Key-value groups by what the output projection cannot make up for when their heads go.

Groups go one after the other. The first to go is the one whose loss leaves the least error after least squares on all
that stay, and the next is judged on those. With P a group's entries and H the second moment of the heads' outputs, the
loss adds tr(W_P [(H^-1)_PP]^-1 W_P^T), where W is the weight as refitted so far (arXiv 2410.15567).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pat_serve.cut.axes import KV_GROUPS
from pat_serve.training.choices.base import InnerChoice, Inputs

RIDGE = 1e-3


class Refit(InnerChoice):
    """Groups of a layer are few, so each is tried."""

    axis: ClassVar[str] = KV_GROUPS
    name: ClassVar[str] = "refit"

    def keep(self, inputs: Inputs, count: int) -> Tensor:
        """Drop the group that costs least, one after the other, until `count` are left."""
        inverse_II, weight_OI = inputs.inverse(RIDGE), inputs.weight_OI.clone()
        left = list(range(inputs.length))
        while len(left) > count:
            errors = {}
            for group in left:
                at = inputs.entries(group)
                # tr(W_P S^-1 W_P^T), S the group's block of the inverse.
                errors[group] = float(
                    (torch.linalg.solve(inverse_II[at, at], weight_OI[:, at].T) * weight_OI[:, at].T).sum()
                )
            gone = min(left, key=lambda group: errors[group])
            at = inputs.entries(gone)
            step_PI = torch.linalg.solve(inverse_II[at, at], inverse_II[at])
            weight_OI -= weight_OI[:, at] @ step_PI
            # The inverse of what is left, with zeros where a group has gone.
            inverse_II = inverse_II - inverse_II[:, at] @ step_PI
            left.remove(gone)
            weight_OI[:, at] = 0
        return torch.tensor(left)

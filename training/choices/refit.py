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
from pat_serve.training.sparse.removal import removal_error, remove

RIDGE = 1e-3


class Refit(InnerChoice):
    """Groups of a layer are few, so each is tried."""

    axis: ClassVar[str] = KV_GROUPS
    name: ClassVar[str] = "refit"

    def keep(self, inputs: Inputs, count: int) -> Tensor:
        """Drop the group that costs least, one after the other, until `count` are left."""
        inverse_II, weight_OI = inputs.inverse(RIDGE), inputs.weight_OI
        left = list(range(inputs.length))
        while len(left) > count:
            errors = {group: float(removal_error(weight_OI, inverse_II, inputs.entries(group)).sum()) for group in left}
            gone = min(left, key=lambda group: errors[group])
            # Afterwards the inverse is that of what is left, with zeros where a group has gone.
            weight_OI, inverse_II = remove(weight_OI, inverse_II, inputs.entries(gone))
            left.remove(gone)
        return torch.tensor(left)

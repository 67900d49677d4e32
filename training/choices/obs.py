"""FFN channels by the error that is left when one goes and all others make up for it: |w_j|^2 / [H^-1]_jj.

Optimal Brain Surgeon's score, of a whole column: H is the second moment of what the down projection reads.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pat_serve.cut.axes import FFN
from pat_serve.training.choices.base import InnerChoice, Inputs, largest

RIDGE = 1e-3


class Obs(InnerChoice):
    """Goes with a refit: without one its promise is not kept."""

    axis: ClassVar[str] = FFN
    name: ClassVar[str] = "obs"

    def keep(self, inputs: Inputs, count: int) -> Tensor:
        """All channels at once, by their scores in the whole layer."""
        return largest(inputs.weight_OI.square().sum(0) / inputs.inverse(RIDGE).diagonal(), count)

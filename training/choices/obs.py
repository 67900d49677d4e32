"""FFN channels by the error that is left when one goes and all others make up for it: |w_j|^2 / [H^-1]_jj.

This is Optimal Brain Surgeon's score of a whole column. H is the second moment of what the down projection reads.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pat_serve.cut.axes import FFN
from pat_serve.training.choices.base import InnerChoice, Inputs, largest

RIDGE = 1e-3


class Obs(InnerChoice):
    """Counts on a refit: without one, no other channel makes up for those that go."""

    axis: ClassVar[str] = FFN
    name: ClassVar[str] = "obs"

    def keep(self, inputs: Inputs, count: int) -> Tensor:
        """Keep the channels with the largest scores; all are judged in the whole layer."""
        return largest(inputs.weight_OI.square().sum(0) / inputs.inverse(RIDGE).diagonal(), count)

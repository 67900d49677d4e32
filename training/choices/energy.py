"""FFN channels by what they add to the stream: the activation's energy times the column's norm (Wanda's, by column)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pat_serve.cut.axes import FFN
from pat_serve.training.choices.base import InnerChoice, Inputs, largest


class Energy(InnerChoice):
    """Judges each channel alone: what others could make up for counts as lost."""

    axis: ClassVar[str] = FFN
    name: ClassVar[str] = "energy"

    def keep(self, inputs: Inputs, count: int) -> Tensor:
        """Keep the indices of the largest E[a_j^2] |w_j|^2."""
        return largest(inputs.second_II.diagonal() * inputs.weight_OI.square().sum(0), count)

"""FFN channels by ridge leverage: how little the others say of a channel's activations (MoDeGPT, arXiv 2408.09632)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pat_serve.cut.axes import FFN
from pat_serve.training.choices.base import InnerChoice, Inputs, largest

# A share of the mean diagonal of the activations' second moment: MoDeGPT's.
RIDGE = 1.0


class Leverage(InnerChoice):
    """Knows the activations and not the weights that read them."""

    axis: ClassVar[str] = FFN
    name: ClassVar[str] = "leverage"

    def keep(self, inputs: Inputs, count: int) -> Tensor:
        """Keep the indices of the largest diag(H (H + r I)^-1), which are those of the smallest diag((H + r I)^-1)."""
        return largest(-inputs.inverse(RIDGE).diagonal(), count)

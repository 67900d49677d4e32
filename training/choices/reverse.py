"""The last layers first, without an exception: the reverse order of the paper (arXiv 2411.15558)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pat_serve.training.choices.base import LayerChoice


class Reverse(LayerChoice):
    """Goes with training of the head and of the layers that are then the last; untuned it loses much."""

    name: ClassVar[str] = "reverse"

    def importance(self, model: Any, num_layers: int, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """Give an earlier layer the larger score."""
        return torch.arange(num_layers, 0, -1)

    def keep(self, model: Any, num_layers: int, batches: Sequence[dict[str, Tensor]], count: int) -> Tensor:
        """The first layers, and no others."""
        return torch.arange(count)

"""The last layers go, except the two that end the model: after tuning as good as any score (arXiv 2411.15558)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pat_serve.training.choices.base import LayerChoice


class Last(LayerChoice):
    """Drop the last layers; this choice needs no data."""

    name: ClassVar[str] = "last"

    def importance(self, model: Any, num_layers: int, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """Give an earlier layer the larger score."""
        return torch.arange(num_layers, 0, -1)

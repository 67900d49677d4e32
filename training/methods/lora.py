"""LoRA alone: the dense baseline with the same budget. Its plan keeps every channel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from pat_serve.axes import HIDDEN
from pat_serve.cuts import AxisCut, Cuts
from pat_serve.training.methods.base import Method


class LoraOnly(Method):
    """Nothing beside LoRA; exports to the base's own shape with the adapter merged."""

    name: ClassVar[str] = "lora"
    prunes: ClassVar[bool] = False

    def attach(self, model: nn.Module, num_layers: int) -> None:
        """Nothing to add."""

    def modules(self) -> dict[str, nn.Module]:
        """None."""
        return {}

    def cuts(self) -> Cuts:
        """The whole hidden axis."""
        return Cuts({HIDDEN: AxisCut(width=self.hidden_size, kept=torch.arange(self.hidden_size))})

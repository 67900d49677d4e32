"""PAT with a dense D x D operator instead of the low-rank hybrid: the upper end of the rank sweep, for the study alone.

y = s * g * (W x), W = I + L1 trained directly: D^2 numbers an operator, where L1 L0 of full rank has 2 D^2. It is kept
as a hybrid operator whose L0 is the identity and stays so, so that plan, export and parity gate take it as they are.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods.pat.hsm import HybridModule, SharedMask
from pat_serve.training.methods.pat.method import Pat


class DenseModule(HybridModule):
    """An HSM with a dense operator; starts as the identity, like the hybrid one."""

    def __init__(self, hidden_size: int, mask: SharedMask) -> None:
        super().__init__(hidden_size, hidden_size, mask)
        with torch.no_grad():
            self.l0_RD.copy_(torch.eye(hidden_size))
        self.l0_RD.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute what the hybrid one does, without the product with an identity, which would cost the step time."""
        if not self.enabled:
            return x
        gain_D = self.scale_D * self._mask[0]()
        return ((x + F.linear(x, self.l1_DR.to(x.dtype))) * gain_D).to(x.dtype)

    def orthonormal(self) -> Tensor:
        """W itself: mse(W W^T, I) is the identity loss of an operator that is not split in two."""
        return self.l0_RD + self.l1_DR


class DensePat(Pat):
    """PAT as it is, but for its operators."""

    name: ClassVar[str] = "pat-dense-operator"

    @classmethod
    def stays_wide(cls, recipe: TrainRecipe) -> str | None:
        """Always, whatever the recipe's rank says."""
        return super().stays_wide(recipe) or "its operators mix channels before some of them go"

    def make_hsm(self, site: str, rank: int) -> HybridModule:
        """Dense on every writer, whatever the recipe's rank."""
        return DenseModule(self.hidden_size, self.mask)

"""The modules that PAT trains: one mask shared by all, and a hybrid identity operator on every residual writer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pat_serve.errors import EmptyMask
from pat_serve.hybrid import HybridFold, apply_hybrid
from pat_serve.training.losses import kept_channels
from pat_serve.training.schedule import GateSchedule

LEAST_GATE = 0.01


class SharedMask(nn.Module):
    """The unified sparsification mask: one logit a channel, one gate for all HSMs.

    Args:
        hidden_size: D.
        target_width: K, the number of channels to keep.
        schedule: how the gate hardens.

    At `schedule.freeze_step` the K largest logits become gates of exactly 1 and all others of exactly 0, so that the
    width that is trained from then on is the width that is exported.
    """

    def __init__(self, hidden_size: int, target_width: int, schedule: GateSchedule) -> None:
        super().__init__()
        self.target_width = target_width
        self.schedule = schedule
        self.step = 0
        self.freeze_gap = 0.0
        self.logits_D = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))
        self.frozen_gate_D: Tensor
        # Not in the state dict: set_step derives it from the logits, which no longer move once frozen.
        self.register_buffer("frozen_gate_D", torch.ones(hidden_size, dtype=torch.float32), persistent=False)

    @property
    def frozen(self) -> bool:
        """The gate is exactly 0 or 1 and stays so."""
        return self.step >= self.schedule.freeze_step

    def set_step(self, step: int) -> None:
        """Tell the mask which optimizer step comes next (0 for the first)."""
        self.step = step
        if self.frozen and self.logits_D.requires_grad:
            self._freeze()

    def gate(self) -> Tensor:
        """The gate (D,) at the present step, float32."""
        if self.frozen:
            return self.frozen_gate_D
        return torch.sigmoid(self.schedule.temperature(self.step) * self.logits_D) + self.schedule.offset(self.step)

    def require_open(self) -> None:
        """Check that something passes the gate.

        All logits may well be negative for a few steps, the count loss turns them back; a gate that is closed on every
        channel switches the model off, and no gradient brings it back.

        Raises:
            EmptyMask: every gate is below 0.01.
        """
        widest = float(self.gate().detach().max())
        if widest < LEAST_GATE:
            raise EmptyMask(
                f"the mask before step {self.step + 1}",
                expected=f"at least one channel with a gate above {LEAST_GATE}",
                found=f"none, the widest is {widest:.2g}",
                fix="Train again with a lower --mask-learning-rate.",
            )

    def kept_indices(self) -> Tensor:
        """int64 (K,): the channels with the K largest logits, ascending; equal logits go to the lower index."""
        order = torch.sort(self.logits_D.detach().cpu(), descending=True, stable=True).indices
        return order[: self.target_width].sort().values

    def metrics(self) -> dict[str, float]:
        """What a person wants to see: kept channels, and how far the gate is from 0/1."""
        gate_D = self.gate().detach()
        hard_D = gate_D if self.frozen else kept_channels(self.logits_D).float()
        return {
            "gate_kept": float(hard_D.sum()),
            "gate_mean": float(gate_D.mean()),
            "gate_softness": float((gate_D - hard_D).abs().mean()),
        }

    def _freeze(self) -> None:
        with torch.no_grad():
            kept = self.kept_indices().to(self.logits_D.device)
            hard_D = torch.zeros_like(self.frozen_gate_D).index_fill_(0, kept, 1.0)
            tau = self.schedule.temperature(self.schedule.freeze_step)
            # How much the projection moved the gate: 0 when the mask had polarised to exactly K channels by itself.
            self.freeze_gap = float((torch.sigmoid(tau * self.logits_D) - hard_D).abs().mean())
            self.frozen_gate_D.copy_(hard_D)
        self.logits_D.requires_grad_(False)


class HybridModule(nn.Module):
    """One HSM: y = s * g * (x + L1 L0 x), x of shape (..., D).

    Starts as the identity: L1 is zero, s is one, and the shared gate is one at step 0. L0 is Kaiming-uniform with
    a = sqrt 5, as in the published code. Parameters are float32 whatever the base's dtype.
    """

    def __init__(self, hidden_size: int, rank: int, mask: SharedMask) -> None:
        super().__init__()
        self.l0_RD = nn.Parameter(torch.empty(rank, hidden_size, dtype=torch.float32))
        self.l1_DR = nn.Parameter(torch.zeros(hidden_size, rank, dtype=torch.float32))
        self.scale_D = nn.Parameter(torch.ones(hidden_size, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.l0_RD, a=math.sqrt(5))
        # In a tuple, so that the mask is not registered once more under every HSM.
        self._mask = (mask,)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator and the shared gate."""
        return apply_hybrid(x, self.operator(), self._mask[0].gate())

    def operator(self) -> HybridFold:
        """The live parameters as a fold."""
        return HybridFold(l0_RD=self.l0_RD, l1_DR=self.l1_DR, scale_D=self.scale_D)

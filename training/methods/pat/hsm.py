"""The modules that PAT trains: one mask shared by all, and a hybrid identity operator on every residual writer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pat_serve.cut.hybrid import LEAST_SCALE, HybridFold
from pat_serve.errors import EmptyMask
from pat_serve.training.methods.pat.losses import TARGET_LOGIT, kept_channels
from pat_serve.training.methods.pat.schedule import GateSchedule
from pat_serve.training.ranks import same_on_all, whole

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
        self._projected = False
        self.logits_D = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32), requires_grad=schedule.trains_mask)
        self.frozen_gate_D: Tensor
        # This is not in the state dict: set_step derives it from the logits, which no longer move once frozen.
        self.register_buffer("frozen_gate_D", torch.ones(hidden_size, dtype=torch.float32), persistent=False)

    @property
    def frozen(self) -> bool:
        """The gate is exactly 0 or 1 and stays so."""
        return self.step >= self.schedule.freeze_step

    def start_from(self, importance_D: Tensor) -> None:
        """Start the K most important channels near the logit that the mask losses want, the others near its negative.

        Logits of the same sign keep the order of importance, a thousandth apart, for `gradual`.

        Args:
            importance_D: (D,), larger is more important; equal ones go to the lower index.
        """
        order = torch.sort(importance_D, descending=True, stable=True).indices
        spread_D = torch.linspace(1e-3, 0, len(order))
        with torch.no_grad():
            self.logits_D.fill_(-TARGET_LOGIT)
            self.logits_D[order[: self.target_width]] = TARGET_LOGIT
            self.logits_D[order] += spread_D

    def set_step(self, step: int) -> None:
        """Tell the mask which optimizer step comes next (0 for the first)."""
        self.step = step
        if self.frozen and not self._projected:
            self._projected = True
            self._freeze()

    def forward(self) -> Tensor:
        """The gate, for the HSMs: a call, so that what shards parameters by module can gather the logits."""
        return self.gate()

    def gate(self) -> Tensor:
        """The gate (D,) at the present step, float32."""
        if self.frozen:
            return self.frozen_gate_D
        return self.schedule.gate(whole(self.logits_D), self.step, self.target_width)

    def require_open(self) -> None:
        """Check that something passes the gate.

        All logits may be negative for a few steps, and the count loss turns them back. A gate that is closed on every
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
        order = torch.sort(whole(self.logits_D.detach()).cpu(), descending=True, stable=True).indices
        return order[: self.target_width].sort().values

    def metrics(self) -> dict[str, float]:
        """Figures for a person: kept channels, and the distance of the gate from 0 and 1."""
        gate_D = self.gate().detach()
        hard_D = gate_D if self.frozen else kept_channels(whole(self.logits_D)).float()
        return {
            "gate_kept": float(hard_D.sum()),
            "gate_mean": float(gate_D.mean()),
            "gate_softness": float((gate_D - hard_D).abs().mean()),
        }

    def _freeze(self) -> None:
        with torch.no_grad():
            logits_D = whole(self.logits_D)
            kept = same_on_all(self.kept_indices().to(logits_D.device), "the mask")
            hard_D = torch.zeros_like(self.frozen_gate_D).index_fill_(0, kept, 1.0)
            # How much the projection moved the gate: 0 when the mask had polarised to exactly K channels by itself.
            if self.schedule.trains_mask:
                soft_D = self.schedule.gate(logits_D, self.schedule.freeze_step, self.target_width)
                self.freeze_gap = float((soft_D - hard_D).abs().mean())
            self.frozen_gate_D.copy_(hard_D)
        self.logits_D.requires_grad_(False)


class HybridModule(nn.Module):
    """One HSM: y = s * g * (x + L1 L0 x), x of shape (..., D).

    Starts as the identity: L1 is zero, s is one, and the shared gate is one at step 0. L0 is Kaiming-uniform with
    a = sqrt 5, as in the published code. Parameters are float32 whatever the base's dtype.

    With rank 0 it is mask and scale alone, which leaves a tied embedding tied: the scale is then divided out again
    before the head, so it is kept at `LEAST_SCALE` or above.
    """

    def __init__(self, hidden_size: int, rank: int, mask: SharedMask) -> None:
        super().__init__()
        # A parameter without an element would never get a gradient, and distributed training takes that for an error.
        self.l0_RD = nn.Parameter(torch.empty(rank, hidden_size, dtype=torch.float32), requires_grad=rank > 0)
        self.l1_DR = nn.Parameter(torch.zeros(hidden_size, rank, dtype=torch.float32), requires_grad=rank > 0)
        self.scale_D = nn.Parameter(torch.ones(hidden_size, dtype=torch.float32))
        if rank:
            nn.init.kaiming_uniform_(self.l0_RD, a=math.sqrt(5))
        self.rank = rank
        self.enabled = True
        self._gated = True
        # The mask is in a tuple, so that it is not registered once more under every HSM.
        self._mask = (mask,)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator and the shared gate: `apply_hybrid` with less kept for the backward pass."""
        if not self.enabled:
            return x
        gain_D = self.scale_D * self._mask[0]() if self._gated else self.scale_D
        if not self.rank:
            return (x * gain_D).to(x.dtype)
        y: Tensor = _Hybrid.apply(x, self.l0_RD, self.l1_DR, gain_D)  # type: ignore[no-untyped-call]  # torch's
        return y

    def narrow(self, kept_K: Tensor) -> None:
        """Take inputs of the kept channels alone, for all of which the gate is open."""
        for parameter, dimension in ((self.l0_RD, 1), (self.l1_DR, 0), (self.scale_D, 0)):
            parameter.data = parameter.data.index_select(dimension, kept_K.to(parameter.device))
        self._gated = False

    def bound_scale(self) -> None:
        """Project the scale to `LEAST_SCALE` and above."""
        with torch.no_grad():
            self.scale_D.clamp_(min=LEAST_SCALE)

    def orthonormal(self) -> Tensor:
        """The factor whose rows the identity loss keeps orthonormal: L0 (R, D)."""
        return self.l0_RD

    def operator(self) -> HybridFold:
        """The live parameters as a fold."""
        return HybridFold(l0_RD=self.l0_RD, l1_DR=self.l1_DR, scale_D=self.scale_D)


class _Hybrid(torch.autograd.Function):
    """gain * (x + L1 L0 x), gain = s * g.

    By default autograd keeps x for L0's gradient and x + L1 L0 x for the gain's. The second is as large as the first,
    for every HSM of the model. One thin product gives it again, so this function does not keep it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, l0_RD: Tensor, l1_DR: Tensor, gain_D: Tensor) -> Tensor:
        low_R = F.linear(x, l0_RD.to(x.dtype)).to(x.dtype)
        ctx.save_for_backward(x, low_R, l0_RD, l1_DR, gain_D)
        return ((x + F.linear(low_R, l1_DR.to(x.dtype))) * gain_D).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        x, low_R, l0_RD, l1_DR, gain_D = ctx.saved_tensors
        l0, l1 = l0_RD.to(x.dtype), l1_DR.to(x.dtype)
        x_TD, low_TR, y_TD = x.flatten(0, -2), low_R.flatten(0, -2), gradients[0].flatten(0, -2)
        gain_gradient_D = ((x_TD + low_TR @ l1.T) * y_TD.to(gain_D.dtype)).sum(0)
        moved_TD = (y_TD * gain_D).to(x.dtype)
        hidden_TR = moved_TD @ l1
        x_gradient = (moved_TD + hidden_TR @ l0).view_as(x) if ctx.needs_input_grad[0] else None
        l0_gradient, l1_gradient = hidden_TR.T @ x_TD, moved_TD.T @ low_TR
        return x_gradient, l0_gradient.to(l0_RD.dtype), l1_gradient.to(l1_DR.dtype), gain_gradient_D

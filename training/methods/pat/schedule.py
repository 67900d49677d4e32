"""How the gate of the unified sparsification mask hardens, in optimizer steps, as pure functions.

`anneal` is PAT's (arXiv 2408.14721, section 3.3). With t the step and s0 the milestone,
tau = 1 / (1 - ln(max(1, t)) / ln(s0) + 1e-6), beta = max(0.5 - t / s0, 0), g = sigmoid(tau * m) + beta.
The published runs take s0 = 10,000 of about 30,000 steps; here it scales with the run's length.

The other two know from the start which channels go, so the mask is not trained: `gradual` fades them one after the
other, the least important first, until the freeze; `cut` has them at zero from the first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GateKind = Literal["anneal", "gradual", "cut"]

# With `gradual` a channel fades over the time in which this share of all leaving channels begin to fade.
FADE_SHARE = 0.25
# A gate that closes while it trains needs a few steps for the soft phase, and the model some more after the freeze.
LEAST_STEPS = 12

# From this share of the milestone on the mask no longer moves.
FREEZE_SHARE = 0.8


def least_steps(kind: str) -> int:
    """Least optimizer steps of a run with this gate; one where the cut stands before the first step."""
    return 1 if kind == "cut" else LEAST_STEPS


@dataclass(frozen=True, kw_only=True)
class GateSchedule:
    """The schedule by which the gate hardens.

    Attributes:
        milestone: s0, in optimizer steps; at least 4 so that the temperature is defined and the freeze comes after
            the soft phase began.
        kind: anneal, gradual or cut.
    """

    milestone: int
    kind: GateKind = "anneal"

    def __post_init__(self) -> None:
        assert self.milestone >= 4

    @staticmethod
    def for_run(total_steps: int, milestone_share: float = 1 / 3, kind: GateKind = "anneal") -> GateSchedule:
        """The paper's schedule scaled to a run of `total_steps` optimizer steps."""
        return GateSchedule(milestone=max(4, round(total_steps * milestone_share)), kind=kind)

    @property
    def trains_mask(self) -> bool:
        """The training decides which channels stay; otherwise the mask's start does."""
        return self.kind == "anneal"

    @property
    def freeze_step(self) -> int:
        """First step at which the gate is exactly 0 or 1."""
        return 0 if self.kind == "cut" else math.ceil(FREEZE_SHARE * self.milestone)

    def gate(self, logits_D: Tensor, step: int, target_width: int) -> Tensor:
        """The soft gate (D,) at a step before the freeze.

        Args:
            logits_D: of the mask.
            step: optimizer step, from 0.
            target_width: K.
        """
        if self.kind == "anneal":
            return torch.sigmoid(self.temperature(step) * logits_D) + self.offset(step)
        # Each channel's place in the order in which they go: 0 for the weakest.
        ascending_D = torch.sort(torch.sort(logits_D, stable=True).indices).indices
        going = len(logits_D) - target_width
        position = (step + 1) / self.freeze_step * going * (1 + FADE_SHARE)
        faded_D = ((position - ascending_D) / (going * FADE_SHARE)).clamp(0, 1)
        return torch.where(ascending_D < going, 1 - faded_D, 1.0)

    def temperature(self, step: int) -> float:
        """tau: 1 at the start, growing without bound towards the milestone."""
        step = min(step, self.freeze_step)
        return 1 / (1 - math.log(max(1, step)) / math.log(self.milestone) + 1e-6)

    def offset(self, step: int) -> float:
        """beta: lifts every gate to 1 at the start, 0 from half the milestone on."""
        return max(0.5 - step / self.milestone, 0.0)

    def mask_learning_rate(self) -> float:
        """Learning rate with which a logit could travel from 0 to 0.5, its target, within the milestone.

        The published 5e-5 over 10,000 steps is the same 0.5. It is an upper bound on the way, not a promise: logits
        near the count's threshold turn back and forth. `gate_freeze_gap` says how far from 0/1 the gate was.
        """
        return 0.5 / self.milestone

"""The gate schedule of the unified sparsification mask, in optimizer steps, as pure functions.

Source: PAT (arXiv 2408.14721), section 3.3. With t the step and s0 the milestone,
tau = 1 / (1 - ln(max(1, t)) / ln(s0) + 1e-6), beta = max(0.5 - t / s0, 0), g = sigmoid(tau * m) + beta.
The published runs take s0 = 10,000 of about 30,000 steps; here it scales with the run's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# From this share of the milestone on the mask no longer moves.
FREEZE_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class GateSchedule:
    """When the gate hardens.

    Attributes:
        milestone: s0, in optimizer steps; at least 4 so that the temperature is defined and the freeze comes after
            the soft phase began.
    """

    milestone: int

    def __post_init__(self) -> None:
        assert self.milestone >= 4

    @staticmethod
    def for_run(total_steps: int, milestone_share: float = 1 / 3) -> GateSchedule:
        """The paper's schedule scaled to a run of `total_steps` optimizer steps."""
        return GateSchedule(milestone=max(4, round(total_steps * milestone_share)))

    @property
    def freeze_step(self) -> int:
        """First step at which the gate is exactly 0 or 1."""
        return math.ceil(FREEZE_SHARE * self.milestone)

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

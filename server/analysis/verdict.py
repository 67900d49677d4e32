"""From an interval to a verdict on a claimed speed-up. Pure logic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

MIN_ROUNDS = 5
# Above this spread of one model's rounds the machine was doing something else as well, and what it did need not have
# hit both models alike: the pairs no longer protect the ratio.
MAX_NOISE = 0.15


class Verdict(StrEnum):
    """Outcome of a check; `exit_code` is what a command returns for it."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 3 inconclusive."""
        return {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.INCONCLUSIVE: 3}[self]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict with its reason in words."""

    verdict: Verdict
    reason: str


def judge(*, claim: float, low: float, high: float, rounds: int, noise: float) -> Judgement:
    """Compare a claimed ratio with the interval of the measured one.

    Args:
        claim: the claimed speed-up, above 0.
        low: lower end of the ratio's interval.
        high: upper end.
        rounds: number of pairs behind it.
        noise: the larger relative median absolute deviation of the two models' rounds.

    Returns:
        pass when the whole interval reaches the claim, fail when none of it does, else inconclusive; inconclusive also
        with fewer than 5 rounds or more than 15 % noise.
    """
    interval = f"[{low:.3f}, {high:.3f}]"
    if rounds < MIN_ROUNDS:
        return Judgement(verdict=Verdict.INCONCLUSIVE, reason=f"only {rounds} rounds, {MIN_ROUNDS} are the least")
    if noise > MAX_NOISE:
        return Judgement(
            verdict=Verdict.INCONCLUSIVE,
            reason=f"a model's rounds spread by {noise:.1%}, more than {MAX_NOISE:.0%}: the machine was not quiet",
        )
    if low >= claim:
        return Judgement(verdict=Verdict.PASS, reason=f"the interval {interval} lies wholly at or above {claim:g}")
    if high < claim:
        return Judgement(verdict=Verdict.FAIL, reason=f"the interval {interval} lies wholly below {claim:g}")
    return Judgement(verdict=Verdict.INCONCLUSIVE, reason=f"the interval {interval} contains {claim:g}")


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict over several regimes: fail if any fails, pass if all pass, else inconclusive."""
    if Verdict.FAIL in verdicts:
        return Verdict.FAIL
    if verdicts and all(verdict is Verdict.PASS for verdict in verdicts):
        return Verdict.PASS
    return Verdict.INCONCLUSIVE

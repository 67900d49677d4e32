"""The verdict on a claimed speed-up, from the interval of the measured one. Pure logic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

MIN_ROUNDS = 5
# Above this spread of one model's rounds the machine was doing something else as well. That disturbance may have hit
# the two models differently, and the pairs then no longer protect the ratio.
MAX_NOISE = 0.15
# A drift cancels in pairs, so this limit is generous. A machine that slows down evenly by a third is already stopped by
# MAX_NOISE. This limit stops a machine that becomes another one in the last rounds, which a median of deviations does
# not show.
MAX_DRIFT = 0.5
# With others on more than half of the machine, the check measures a rivalry, however evenly they worked.
MAX_OTHER_CPU_SHARE = 0.5
# A claim is a figure with a precision: 1.33 stands for 4/3 as much as for 1.325. A margin of non-inferiority says by
# how much a ratio may miss the claim and still meet it. A margin of half the claim would make it another claim.
DEFAULT_MARGIN, MARGIN_BOUND = 0.02, 0.5


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
class Claim:
    """A claimed speed-up and the margin within which it counts as met.

    Attributes:
        ratio: the speed-up, above 0.
        margin: of non-inferiority, a share of the ratio in [0, MARGIN_BOUND); 0 is the strict reading.
    """

    ratio: float
    margin: float = DEFAULT_MARGIN

    @property
    def threshold(self) -> float:
        """The ratio that an interval must reach."""
        return self.ratio * (1 - self.margin)

    @property
    def strict(self) -> Claim:
        """The same claim without a margin."""
        return Claim(ratio=self.ratio, margin=0.0)

    def __str__(self) -> str:
        """The claim as reports write it before a verdict."""
        return f"claim {self.ratio:g}x" + (f", margin {100 * self.margin:.3g}%" if self.margin else "")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict with its reason in words; `strict` is the verdict without a margin."""

    verdict: Verdict
    strict: Verdict
    reason: str


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The surroundings of a check's rounds.

    Attributes:
        other_cpu_share: share of the machine's CPU time that other processes took, in the median round.
        settled: both models' last two warm-up runs agreed.
    """

    other_cpu_share: float
    settled: bool


class Obstacle(StrEnum):
    """A reason for which nothing may be said about a claim, whatever the interval is."""

    FEW_ROUNDS = "few rounds"
    NOISE = "noise"
    DRIFT = "drift"
    RIVALS = "rivals"
    UNSETTLED = "unsettled"


def obstacles_around(surroundings: Surroundings) -> frozenset[Obstacle]:
    """The obstacles to a whole check."""
    found = {
        Obstacle.RIVALS: surroundings.other_cpu_share > MAX_OTHER_CPU_SHARE,
        Obstacle.UNSETTLED: not surroundings.settled,
    }
    return frozenset(one for one, there in found.items() if there)


def obstacles_within(*, rounds: int, spread: float, drift: float) -> frozenset[Obstacle]:
    """The obstacles to one series of rounds.

    Args:
        rounds: number of pairs.
        spread: the larger relative median absolute deviation of the two models' rounds.
        drift: second half of the rounds over the first, less 1; too large in either direction is an obstacle.
    """
    found = {
        Obstacle.FEW_ROUNDS: rounds < MIN_ROUNDS,
        Obstacle.NOISE: spread > MAX_NOISE,
        Obstacle.DRIFT: max(1 + drift, 1 / (1 + drift)) - 1 > MAX_DRIFT,
    }
    return frozenset(one for one, there in found.items() if there)


def obstacles(*, rounds: int, spread: float, drift: float, surroundings: Surroundings) -> tuple[str, ...]:
    """A sentence for each obstacle; empty where there is none.

    Args:
        rounds: number of pairs.
        spread: the larger relative median absolute deviation of the two models' rounds.
        drift: second half of the rounds over the first, less 1.
        surroundings: of the check.
    """
    found = obstacles_within(rounds=rounds, spread=spread, drift=drift) | obstacles_around(surroundings)
    if Obstacle.FEW_ROUNDS in found:
        # Nothing else can be told from so few rounds.
        return (f"only {rounds} rounds, {MIN_ROUNDS} are the least",)
    others = f"{surroundings.other_cpu_share:.0%} of the CPU time, more than {MAX_OTHER_CPU_SHARE:.0%}"
    told = {
        Obstacle.NOISE: f"a model's rounds spread by {spread:.1%}, more than {MAX_NOISE:.0%}: "
        "the machine was not quiet",
        Obstacle.DRIFT: f"the rounds drifted by {drift:+.0%}, a factor beyond {1 + MAX_DRIFT:g}: the machine changed",
        Obstacle.RIVALS: f"other processes took {others}",
        Obstacle.UNSETTLED: "the warm-up did not settle: no two runs in a row agreed",
    }
    return tuple(sentence for one, sentence in told.items() if one in found)


def judge(
    *, claim: Claim, low: float, high: float, rounds: int, spread: float, drift: float, surroundings: Surroundings
) -> Judgement:
    """Compare a claimed ratio with the interval of the measured one.

    Args:
        claim: the claimed speed-up with its margin.
        low: lower end of the ratio's interval.
        high: upper end.
        rounds: number of pairs behind it.
        spread: the larger relative median absolute deviation of the two models' rounds.
        drift: second half of the rounds over the first, less 1.
        surroundings: of the check.

    Returns:
        pass when the whole interval reaches the claim's threshold, fail when none of it does, else inconclusive;
        inconclusive also where there are obstacles. The strict reading stands in every reason that has a margin.
    """
    told = obstacles(rounds=rounds, spread=spread, drift=drift, surroundings=surroundings)
    if told:
        return Judgement(verdict=Verdict.INCONCLUSIVE, strict=Verdict.INCONCLUSIVE, reason="; ".join(told))
    verdict, strict = (_side(one.threshold, low, high) for one in (claim, claim.strict))
    where = {Verdict.PASS: "lies wholly at or above", Verdict.FAIL: "lies wholly below"}.get(verdict, "contains")
    reason = f"the interval [{low:.3f}, {high:.3f}] {where} "
    if claim.margin:
        reason += f"{claim.threshold:.3f}, {100 * claim.margin:.3g}% under {claim.ratio:g} (strictly: {strict.value})"
    else:
        reason += f"{claim.ratio:g}"
    return Judgement(verdict=verdict, strict=strict, reason=reason)


def _side(threshold: float, low: float, high: float) -> Verdict:
    if low >= threshold:
        return Verdict.PASS
    return Verdict.FAIL if high < threshold else Verdict.INCONCLUSIVE


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict over several regimes: fail if any fails, pass if all pass, else inconclusive."""
    if Verdict.FAIL in verdicts:
        return Verdict.FAIL
    if verdicts and all(verdict is Verdict.PASS for verdict in verdicts):
        return Verdict.PASS
    return Verdict.INCONCLUSIVE

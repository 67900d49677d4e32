"""Advice that would make an inconclusive check conclusive. Pure logic."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pat_serve.server.analysis.precision import rounds_for_verdict
from pat_serve.server.analysis.statistics import PairedRatio, RatioInterval
from pat_serve.server.analysis.verdict import (
    MAX_DRIFT,
    MAX_NOISE,
    MAX_OTHER_CPU_SHARE,
    MIN_ROUNDS,
    Claim,
    Obstacle,
    Surroundings,
    Verdict,
    obstacles_around,
    obstacles_within,
)
from pat_serve.server.bench.speedup.depth_result import Extrapolated
from pat_serve.server.bench.speedup.result import RegimeResult


def advise(
    regimes: Sequence[RegimeResult | Extrapolated],
    average: PairedRatio | None,
    *,
    claim: Claim,
    seconds_per_round: float,
    surroundings: Surroundings,
) -> tuple[str, ...]:
    """Give a sentence for each obstacle.

    Args:
        regimes: as judged.
        average: given where the claim is about the average; the regimes' own intervals then do not matter.
        claim: the claimed speed-up with its margin.
        seconds_per_round: seconds that another round takes.
        surroundings: of the check.
    """
    advice, around = [], obstacles_around(surroundings)
    others_share = surroundings.other_cpu_share
    others = f" (they took {others_share:.0%} of it)" if others_share >= 0.01 else ""
    if Obstacle.UNSETTLED in around:
        advice.append(
            "a warm-up that settles: end other processes, or give the engines longer prompts or more requests"
        )
    if Obstacle.RIVALS in around:
        advice.append(f"a machine of which others take {MAX_OTHER_CPU_SHARE:.0%} at most: end them{others}")
    for result in regimes:
        if average is None and result.verdict is not Verdict.INCONCLUSIVE:
            continue
        noise = result.noise
        within = obstacles_within(rounds=result.ratio.rounds, spread=noise.spread, drift=noise.drift)
        disturbances = within - {Obstacle.FEW_ROUNDS}
        if Obstacle.NOISE in within:
            advice.append(
                f"{result.name}: a machine on which rounds spread by at most {MAX_NOISE:.0%}, not {noise.spread:.1%}: "
                f"end other processes{others}, or rent one whose cores nobody shares"
            )
        if Obstacle.DRIFT in within:
            advice.append(
                f"{result.name}: a machine whose speed stays within a factor of {1 + MAX_DRIFT:g}, not "
                f"{noise.drift:+.0%}: let it come to rest, or find what slows it down"
            )
        if average is None and not (around or disturbances):
            advice.append(f"{result.name}: {_more_rounds(result.ratio, claim, seconds_per_round)}")
    if average is not None and average.low < claim.threshold <= average.high:
        advice.append(f"average: {_more_rounds(average, claim, seconds_per_round)}")
    return tuple(advice)


def _more_rounds(ratio: PairedRatio | RatioInterval, claim: Claim, seconds_per_round: float) -> str:
    done = ratio.rounds
    if done < MIN_ROUNDS:
        return f"at least {MIN_ROUNDS} rounds"
    needed = rounds_for_verdict(ratio, claim.threshold)
    if needed is None:
        return (
            f"no sensible number of rounds decides, {ratio.median:.3f} is too close to {claim.threshold:.4g}; "
            f"a claim up to {ratio.low / (1 - claim.margin):.3f} would pass on these rounds, one above "
            f"{ratio.high / (1 - claim.margin):.3f} would fail"
        )
    minutes = math.ceil((needed - done) * seconds_per_round / 60)
    return f"about {needed} rounds in all if the ratio stays, {minutes} min more: --rounds {needed}"

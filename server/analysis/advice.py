"""What would make an inconclusive check conclusive. Pure logic."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pat_serve.server.analysis.precision import rounds_for_verdict
from pat_serve.server.analysis.statistics import PairedRatio
from pat_serve.server.analysis.verdict import MAX_NOISE, MIN_ROUNDS, Verdict
from pat_serve.server.bench.speedup_result import RegimeResult


def advise(
    regimes: Sequence[RegimeResult],
    average: PairedRatio | None,
    *,
    claim: float,
    seconds_per_round: float,
    other_cpu_share: float,
) -> tuple[str, ...]:
    """A sentence for each thing that stands in the way.

    Args:
        regimes: as judged.
        average: where the claim is about it; then the regimes' own intervals do not matter.
        claim: the claimed speed-up.
        seconds_per_round: what another round takes.
        other_cpu_share: share of the machine that other processes took.
    """
    advice = []
    for result in regimes:
        name = f"{result.regime.value}, batch {result.batch_size}"
        if result.noise.spread > MAX_NOISE and (result.verdict is Verdict.INCONCLUSIVE or average is not None):
            others = f" (they took {other_cpu_share:.0%} of it)" if other_cpu_share >= 0.01 else ""
            advice.append(
                f"{name}: a machine on which rounds spread by at most {MAX_NOISE:.0%}, not {result.noise.spread:.1%}: "
                f"end other processes{others}, or rent one whose cores nobody shares"
            )
        elif result.verdict is Verdict.INCONCLUSIVE and average is None:
            advice.append(f"{name}: {_more_rounds(result.ratio, claim, seconds_per_round)}")
    if average is not None and average.low < claim <= average.high:
        advice.append(f"average: {_more_rounds(average, claim, seconds_per_round)}")
    return tuple(advice)


def _more_rounds(ratio: PairedRatio, claim: float, seconds_per_round: float) -> str:
    done = len(ratio.ratios)
    if done < MIN_ROUNDS:
        return f"at least {MIN_ROUNDS} rounds"
    needed = rounds_for_verdict(ratio, claim)
    if needed is None:
        return (
            f"no sensible number of rounds decides, {ratio.median:.3f} is too close to {claim:g}; "
            f"a claim up to {ratio.low:.3f} would pass on these rounds, one above {ratio.high:.3f} would fail"
        )
    minutes = math.ceil((needed - done) * seconds_per_round / 60)
    return f"about {needed} rounds in all if the ratio stays, {minutes} min more: --rounds {needed}"

"""The number of rounds that a wanted precision or a verdict takes. Pure mathematics.

The interval of a median narrows with the root of the number of rounds, whatever the noise is made of, as long as rounds
are independent. So a few rounds tell about how many would do. Rounds are added until the interval is narrow, never
until the verdict is welcome: stopping at a wanted outcome would make that outcome likelier.
"""

from __future__ import annotations

import math

from pat_serve.server.analysis.statistics import PairedRatio, RatioInterval

# Nobody waits for more rounds than this. A claim so close to the truth is neither true nor false in any way that
# matters.
MAX_SENSIBLE_ROUNDS = 2000
# An estimate from a handful of rounds is rough, and one round too few costs a whole second run.
_SAFETY = 1.2


def relative_width(ratio: PairedRatio) -> float:
    """Width of a ratio's interval over its median."""
    return (ratio.high - ratio.low) / ratio.median


def rounds_for_width(ratio: PairedRatio, wanted: float) -> int:
    """Rounds in all until the interval is likely to be no wider than `wanted`, relative to its median.

    Args:
        ratio: the ratio from the rounds so far.
        wanted: above 0.
    """
    rounds = len(ratio.ratios)
    width = relative_width(ratio)
    return rounds if width <= wanted else math.ceil(_SAFETY * rounds * (width / wanted) ** 2)


def rounds_for_verdict(ratio: PairedRatio | RatioInterval, threshold: float) -> int | None:
    """Rounds in all until the interval is likely to lie on one side of a claim; None if no sensible number does.

    Args:
        ratio: the ratio from the rounds so far.
        threshold: the ratio that decides, the claim less its margin.
    """
    rounds = ratio.rounds
    if ratio.low >= threshold or ratio.high < threshold:
        return rounds
    distance = abs(ratio.median - threshold)
    reach = ratio.median - ratio.low if ratio.median >= threshold else ratio.high - ratio.median
    if distance == 0 or (needed := math.ceil(_SAFETY * rounds * (reach / distance) ** 2)) > MAX_SENSIBLE_ROUNDS:
        return None
    return max(needed, rounds + 1)

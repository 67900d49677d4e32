"""The result of a check from its measurements, for `pat-bench speedup` and for a check on a live server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pat_serve.machine.hardware import describe
from pat_serve.server.analysis.capacity import Capacity
from pat_serve.server.analysis.statistics import PairedRatio
from pat_serve.server.analysis.verdict import Judgement, Verdict
from pat_serve.server.bench.speedup.advice import advise
from pat_serve.server.bench.speedup.analysis import conclude, conclude_average
from pat_serve.server.bench.speedup.depth_result import Extrapolated
from pat_serve.server.bench.speedup.depths import conclude_extrapolated, worst_surroundings
from pat_serve.server.bench.speedup.result import DepthMeasurement, SpeedupResult
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.engine.workers.probe import MachineRates, best_rates


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The beginning of a check: the date for people, and the monotonic clock in seconds for its duration."""

    date: str
    at_s: float

    @staticmethod
    def now() -> Beginning:
        """A check that begins now."""
        return Beginning(date=datetime.now(UTC).isoformat(timespec="seconds"), at_s=time.monotonic())


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """A disturbance that no figure shows, and that makes every verdict inconclusive all the same.

    Attributes:
        told: the disturbance in words.
        way_out: how a check is made without it.
    """

    told: str
    way_out: str


def sum_up(
    depths: Sequence[DepthMeasurement],
    settings: SpeedupSettings,
    *,
    begun: Beginning,
    dtype: str,
    seconds_per_round: float,
    average: PairedRatio | None = None,
    extrapolated: tuple[Extrapolated, ...] = (),
    whole_capacities: tuple[Capacity, ...] = (),
    probes: Sequence[MachineRates] = (),
    disturbance: Disturbance | None = None,
) -> SpeedupResult:
    """Judge the claim, and record everything that it was judged by.

    Args:
        depths: as measured, the shallowest first; one at least.
        settings: of the check.
        begun: when it began.
        dtype: of both models.
        seconds_per_round: seconds that another round takes, at every depth and batch size.
        average: over the batch sizes.
        extrapolated: for the models' own depths.
        whole_capacities: of baseline and candidate at their own depths, where several depths were measured.
        probes: of the machine.
        disturbance: makes the verdict inconclusive.
    """
    deepest = depths[-1]
    judgement = _judge(depths, extrapolated, average, settings)
    advice = advise(
        extrapolated or deepest.regimes,
        average if settings.judge_average else None,
        claim=settings.claimed,
        seconds_per_round=seconds_per_round,
        surroundings=worst_surroundings(depths),
    )
    if disturbance is not None:
        judgement = Judgement(
            verdict=Verdict.INCONCLUSIVE,
            strict=Verdict.INCONCLUSIVE,
            reason=f"{disturbance.told}; {judgement.reason}",
        )
        advice = (disturbance.way_out, *advice)
    return SpeedupResult(
        date=begun.date,
        duration_s=time.monotonic() - begun.at_s,
        machine=describe(),
        dtype=dtype,
        settings=settings,
        baseline=deepest.baseline,
        candidate=deepest.candidate,
        regimes=deepest.regimes,
        average=average,
        stopped=deepest.stopped,
        verdict=judgement.verdict,
        strict_verdict=judgement.strict,
        reason=judgement.reason,
        advice=advice if judgement.verdict is Verdict.INCONCLUSIVE else (),
        rounds=deepest.rounds,
        rates=best_rates(probes),
        probes=tuple(probes),
        extrapolated=extrapolated,
        shallower=tuple(depths[:-1]),
        whole_capacities=whole_capacities,
    )


def _judge(
    depths: Sequence[DepthMeasurement],
    extrapolated: tuple[Extrapolated, ...],
    average: PairedRatio | None,
    settings: SpeedupSettings,
) -> Judgement:
    deepest = depths[-1]
    if settings.depths:
        return conclude_extrapolated(extrapolated, depths, settings)
    if average is not None and settings.judge_average:
        return conclude_average(average, deepest.regimes, settings.claimed, worst_surroundings(depths))
    return conclude(deepest.regimes, deepest.rounds, settings.claimed)

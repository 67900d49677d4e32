"""Lines, ratios and verdicts for whole models from checks at several depths, marked as extrapolated. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from pat_serve.server.analysis.depth import extrapolate
from pat_serve.server.analysis.noise import NoiseReport
from pat_serve.server.analysis.precision import rounds_for_verdict
from pat_serve.server.analysis.verdict import Judgement, Surroundings, Verdict, judge
from pat_serve.server.bench.speedup.analysis import conclude, counted_ceiling, latency_s, rounds_of, surroundings_of
from pat_serve.server.bench.speedup.depth_result import Extrapolated
from pat_serve.server.bench.speedup.grid import Cell
from pat_serve.server.bench.speedup.result import DepthMeasurement, RegimeResult, Round
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.shapes.sizes import ModelSizes


def worst_surroundings(depths: Sequence[DepthMeasurement]) -> Surroundings:
    """The worst surroundings of all depths: the largest share of others, and whether every warm-up settled."""
    found = [surroundings_of(one.rounds, (one.baseline.warm_up, one.candidate.warm_up)) for one in depths]
    return Surroundings(
        other_cpu_share=max(one.other_cpu_share for one in found), settled=all(one.settled for one in found)
    )


def extrapolate_all(
    depths: Sequence[DepthMeasurement],
    settings: SpeedupSettings,
    *,
    whole: tuple[ModelSizes, ModelSizes],
    dtype_bytes: int,
) -> tuple[Extrapolated, ...]:
    """Extrapolate every phase of every batch; a phase whose noise allows no line is left out.

    Args:
        depths: as measured, two at least.
        settings: of the check.
        whole: the shapes of baseline and candidate, uncut.
        dtype_bytes: bytes of a weight.
    """
    surroundings, found = worst_surroundings(depths), []
    for results in zip(*(one.regimes for one in depths), strict=True):
        made = _extrapolate(results, depths, settings, whole=whole, dtype_bytes=dtype_bytes, surroundings=surroundings)
        if made is not None:
            found.append(made)
    return tuple(found)


def conclude_extrapolated(
    found: Sequence[Extrapolated], depths: Sequence[DepthMeasurement], settings: SpeedupSettings
) -> Judgement:
    """One verdict over all phases; inconclusive where a phase has no line."""
    there = {(one.regime, one.batch_size, one.prompt_tokens) for one in found}
    missing = [
        one.name
        for one in depths[0].regimes
        if one.claimed and (one.regime, one.batch_size, one.prompt_tokens) not in there
    ]
    if missing:
        told = f"{' and '.join(missing)}: the rounds are so noisy that no line leads to the whole model"
        return Judgement(verdict=Verdict.INCONCLUSIVE, strict=Verdict.INCONCLUSIVE, reason=told)
    return conclude(found, _all_rounds(depths), settings.claimed)


def _all_rounds(depths: Sequence[DepthMeasurement]) -> list[Round]:
    return [pair for one in depths for pair in one.rounds]


def _extrapolate(
    results: Sequence[RegimeResult],
    depths: Sequence[DepthMeasurement],
    settings: SpeedupSettings,
    *,
    whole: tuple[ModelSizes, ModelSizes],
    dtype_bytes: int,
    surroundings: Surroundings,
) -> Extrapolated | None:
    regime, batch_size = results[0].regime, results[0].batch_size
    cell = Cell(batch_size=batch_size, prompt_tokens=results[0].prompt_tokens or settings.prompt_tokens)
    rounds = [rounds_of(one.rounds, cell) for one in depths]
    lines = extrapolate(
        [one.layers for one in depths],
        [[latency_s(pair.baseline, regime) for pair in pairs] for pairs in rounds],
        [[latency_s(pair.candidate, regime) for pair in pairs] for pairs in rounds],
        layers=(whole[0].layers, whole[1].layers),
        seed=settings.seed,
    )
    if lines is None:
        return None
    noise, ratio = _worst([one.noise for one in results]), lines.ratio
    judgement = judge(
        claim=settings.claimed,
        low=ratio.low,
        high=ratio.high,
        rounds=ratio.rounds,
        spread=noise.spread,
        drift=noise.drift,
        surroundings=surroundings,
    )
    ceiling = counted_ceiling(regime, settings.with_cell(cell), whole, (batch_size, batch_size), dtype_bytes)
    return Extrapolated(
        regime=regime,
        batch_size=batch_size,
        context_tokens=results[0].context_tokens,
        layers_measured=tuple(one.layers for one in depths),
        baseline=lines.baseline,
        candidate=lines.candidate,
        ratio=ratio,
        ceiling=ceiling,
        of_ceiling=ratio.median / ceiling,
        noise=noise,
        rounds_needed=rounds_for_verdict(ratio, settings.claimed.threshold),
        verdict=judgement.verdict,
        strict_verdict=judgement.strict,
        reason=judgement.reason,
        prompt_tokens=results[0].prompt_tokens,
        claimed=results[0].claimed,
    )


def _worst(reports: Sequence[NoiseReport]) -> NoiseReport:
    """The noisiest depth's report, with the largest drift of all."""
    noisiest = max(reports, key=lambda one: one.spread)
    return dataclasses.replace(
        noisiest, drift=max((one.drift for one in reports), key=lambda one: abs(math.log1p(one)))
    )

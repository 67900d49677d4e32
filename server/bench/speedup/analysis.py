"""Ratios and verdicts from recorded rounds. Pure: a stored result can be judged again, against another claim."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pat_serve.server.analysis.noise import noise_report
from pat_serve.server.analysis.precision import rounds_for_verdict
from pat_serve.server.analysis.statistics import PairedRatio, paired_ratio, percentile, summarize
from pat_serve.server.analysis.trace import BatchTrace
from pat_serve.server.analysis.verdict import (
    MAX_OTHER_CPU_SHARE,
    Claim,
    Judgement,
    Surroundings,
    judge,
    overall,
)
from pat_serve.server.bench.latency.result import Roof
from pat_serve.server.bench.latency.summary import Floors, why_beaten
from pat_serve.server.bench.speedup.depth_result import Extrapolated
from pat_serve.server.bench.speedup.grid import Cell, Regime
from pat_serve.server.bench.speedup.result import RegimeResult, Round, WarmUp
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.engine.workers.probe import MachineRates, best_rates
from pat_serve.shapes.roofline import prefill_flops
from pat_serve.shapes.sizes import ModelSizes, decode_bytes

# From this share of the machine on, other processes are worth a word in the verdict's reason.
_TELLING_SHARE = 0.1


def rounds_of(rounds: Sequence[Round], cell: Cell) -> list[Round]:
    """The rounds in which the baseline had such a batch; older records do not say how long the prompts were."""
    return [
        one
        for one in rounds
        if one.baseline.batch_size == cell.batch_size and one.baseline.prompt_tokens in (None, cell.prompt_tokens)
    ]


def latency_s(trace: BatchTrace, regime: Regime) -> float:
    """The duration by which a regime is judged: time to first tokens, or time per output token."""
    return trace.ttft_s if regime is Regime.PREFILL else trace.tpot_s


def cost_s(trace: BatchTrace, regime: Regime, *, per_request: bool) -> float:
    """The duration in a ratio: the latency, or with different batches the latency over the batch size."""
    return latency_s(trace, regime) / (trace.batch_size if per_request else 1)


def context_tokens(regime: Regime, settings: SpeedupSettings) -> float:
    """The prompt's length for prefill; for decode the mean number of tokens in a request's KV cache."""
    # The first decode step finds the prompt and one token in the cache, the last one all but one token.
    return settings.prompt_tokens + (0.0 if regime is Regime.PREFILL else settings.output_tokens / 2)


def counted_ceiling(
    regime: Regime,
    settings: SpeedupSettings,
    shapes: tuple[ModelSizes, ModelSizes],
    batches: tuple[int, int],
    dtype_bytes: int,
) -> float:
    """The largest ratio that FLOPs (prefill) or bytes (decode) allow: of the baseline's work over the candidate's.

    Args:
        regime: the phase.
        settings: give prompt and output.
        shapes: of baseline and candidate.
        batches: batch sizes of both; with different sizes the ratio is that of requests a second.
        dtype_bytes: bytes of a weight.
    """

    def work(shape: ModelSizes, size: int) -> float:
        if regime is Regime.PREFILL:
            return prefill_flops(shape, batch_size=size, prompt_tokens=settings.prompt_tokens)
        context = context_tokens(regime, settings)
        return decode_bytes(shape, batch_size=size, context_tokens=context, dtype_bytes=dtype_bytes)

    return work(shapes[0], batches[0]) / work(shapes[1], batches[1]) * (batches[1] / batches[0])


def surroundings_of(rounds: Sequence[Round], warm_ups: Sequence[WarmUp]) -> Surroundings:
    """The surroundings of a check.

    Args:
        rounds: all of them, one at least.
        warm_ups: of both models.
    """
    return Surroundings(
        other_cpu_share=percentile([pair.other_cpu_share for pair in rounds], 50),
        settled=all(one.stationary for one in warm_ups),
    )


def analyse(
    regime: Regime,
    rounds: Sequence[Round],
    settings: SpeedupSettings,
    *,
    baseline: ModelSizes,
    candidate: ModelSizes,
    dtype_bytes: int,
    surroundings: Surroundings,
    candidate_batch: int | None = None,
    probes: Sequence[MachineRates] = (),
    in_grid: bool = False,
    claimed: bool = True,
) -> RegimeResult:
    """Ratio, ceiling, noise and verdict of one regime at one batch size.

    Args:
        regime: the phase.
        rounds: those with the settings' batch size.
        settings: of these rounds.
        baseline: the dense shape.
        candidate: the other one.
        dtype_bytes: bytes of a weight.
        surroundings: of the whole check.
        candidate_batch: the candidate's batch size, where it is another one.
        probes: of the machine; none leaves the floors out.
        in_grid: the prompts' length tells the regime from others of the check.
        claimed: the claim names it.
    """
    rates = best_rates(probes)
    batch, other_batch = settings.batch_size, candidate_batch or settings.batch_size
    baseline_s = [cost_s(pair.baseline, regime, per_request=settings.fixed_memory) for pair in rounds]
    candidate_s = [cost_s(pair.candidate, regime, per_request=settings.fixed_memory) for pair in rounds]
    ratio = paired_ratio(baseline_s, candidate_s, seed=settings.seed)
    noise = noise_report(baseline_s, candidate_s, [pair.first == "baseline" for pair in rounds])
    context = context_tokens(regime, settings)

    def roof(shape: ModelSizes, size: int, durations_s: Sequence[float]) -> Roof | None:
        if rates is None:
            return None
        floors = Floors(shape=shape, rates=rates, dtype_bytes=dtype_bytes)
        if regime is Regime.PREFILL:
            floor_s = floors.prefill_s(batch_size=size, prompt_tokens=settings.prompt_tokens)
        else:
            floor_s = floors.decode_step_s(batch_size=size, context_tokens=context)
        floor_s /= size if settings.fixed_memory else 1
        reached = floor_s / percentile(durations_s, 50)
        read_bytes = None
        if regime is Regime.DECODE:
            read_bytes = decode_bytes(shape, batch_size=size, context_tokens=context, dtype_bytes=dtype_bytes)
        return Roof(floor_s=floor_s, reached=reached, beaten_by=why_beaten(reached, probes, read_bytes=read_bytes))

    ceiling = counted_ceiling(regime, settings, (baseline, candidate), (batch, other_batch), dtype_bytes)
    judgement = judge(
        claim=settings.claimed,
        low=ratio.low,
        high=ratio.high,
        rounds=len(rounds),
        spread=noise.spread,
        drift=noise.drift,
        surroundings=surroundings,
    )
    return RegimeResult(
        regime=regime,
        batch_size=batch,
        candidate_batch_size=other_batch,
        context_tokens=context,
        baseline=summarize(baseline_s),
        candidate=summarize(candidate_s),
        ratio=ratio,
        ceiling=ceiling,
        of_ceiling=ratio.median / ceiling,
        baseline_noise=noise.baseline_spread,
        candidate_noise=noise.candidate_spread,
        noise=noise,
        rounds_needed=rounds_for_verdict(ratio, settings.claimed.threshold),
        verdict=judgement.verdict,
        strict_verdict=judgement.strict,
        reason=judgement.reason,
        baseline_roof=roof(baseline, batch, baseline_s),
        candidate_roof=roof(candidate, other_batch, candidate_s),
        prompt_tokens=settings.prompt_tokens if in_grid else None,
        claimed=claimed,
    )


def average_ratio(regimes: Sequence[RegimeResult], *, seed: int) -> PairedRatio:
    """Geometric mean of the regimes' ratios, round by round, which weighs every batch size alike.

    The mean is geometric, so that the average ratio of B to A is one over that of A to B.
    """
    logs = [[math.log(ratio) for ratio in result.ratio.ratios] for result in regimes]
    means = [math.exp(sum(one) / len(one)) for one in zip(*logs, strict=True)]
    return paired_ratio(means, [1.0] * len(means), seed=seed)


def conclude_average(
    average: PairedRatio, regimes: Sequence[RegimeResult], claim: Claim, surroundings: Surroundings
) -> Judgement:
    """The verdict on a claim about the average over batch sizes; the noise of the noisiest size counts."""
    judgement = judge(
        claim=claim,
        low=average.low,
        high=average.high,
        rounds=len(average.ratios),
        spread=max(result.noise.spread for result in regimes),
        drift=max((result.noise.drift for result in regimes), key=lambda drift: abs(math.log1p(drift))),
        surroundings=surroundings,
    )
    sizes = ", ".join(str(result.batch_size) for result in regimes)
    ceiling = math.exp(sum(math.log(result.ceiling) for result in regimes) / len(regimes))
    reason = f"average over batches of {sizes}: {judgement.reason}; the median {average.median:.3f} is "
    reason += f"{average.median / ceiling:.0%} of the ceiling {ceiling:.3f}"
    return Judgement(verdict=judgement.verdict, strict=judgement.strict, reason=reason)


def conclude(regimes: Sequence[RegimeResult | Extrapolated], rounds: Sequence[Round], claim: Claim) -> Judgement:
    """One verdict over the regimes that the claim names, with its reason: those that decided it, and the obstacles."""
    regimes = [result for result in regimes if result.claimed]
    verdict = overall([result.verdict for result in regimes])
    parts = []
    for result in regimes:
        if result.verdict is not verdict:
            continue
        ceiling = f"{result.of_ceiling:.0%} of the ceiling {result.ceiling:.3f}"
        if result.ceiling < claim.threshold:
            ceiling += f", which is itself below {claim.threshold:.4g}"
        parts.append(f"{result.name}: {result.reason}; the median is {ceiling}")
    others = percentile([pair.other_cpu_share for pair in rounds], 50)
    # Other processes beyond the second limit are an obstacle, which the reason names already.
    if _TELLING_SHARE < others <= MAX_OTHER_CPU_SHARE:
        parts.append(f"other processes took {others:.0%} of this machine's CPU time meanwhile")
    waiting = percentile([pair.waiting_engine_cpu_share for pair in rounds], 50)
    if waiting > _TELLING_SHARE:
        parts.append(f"the engine whose turn it was not took {waiting:.0%} of a core")
    strict = overall([result.strict_verdict for result in regimes])
    return Judgement(verdict=verdict, strict=strict, reason="; ".join(parts))

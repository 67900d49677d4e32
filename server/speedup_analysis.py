"""From recorded rounds to ratios and verdicts. Pure: a stored result can be judged again, against another claim."""

from __future__ import annotations

from collections.abc import Sequence

from pat_serve.server.roofline import ModelShape, decode_ceiling, prefill_ceiling
from pat_serve.server.speedup_result import Regime, RegimeResult, Round, SpeedupSettings
from pat_serve.server.statistics import paired_ratio, percentile, relative_mad, summarize
from pat_serve.server.trace import BatchTrace
from pat_serve.server.verdict import Verdict, judge, overall

# From this share of the machine on, other processes are worth a word in the verdict's reason.
_TELLING_SHARE = 0.1


def latency_s(trace: BatchTrace, regime: Regime) -> float:
    """The duration that a regime is judged by: time to first tokens, or time per output token."""
    return trace.ttft_s if regime is Regime.PREFILL else trace.tpot_s


def analyse(
    regime: Regime,
    rounds: Sequence[Round],
    settings: SpeedupSettings,
    *,
    baseline: ModelShape,
    candidate: ModelShape,
    dtype_bytes: int,
) -> RegimeResult:
    """Ratio, ceiling, noise and verdict of one regime."""
    baseline_s = [latency_s(pair.baseline, regime) for pair in rounds]
    candidate_s = [latency_s(pair.candidate, regime) for pair in rounds]
    ratio = paired_ratio(baseline_s, candidate_s, seed=settings.seed)
    noise = relative_mad(baseline_s), relative_mad(candidate_s)
    if regime is Regime.PREFILL:
        context = float(settings.prompt_tokens)
        ceiling = prefill_ceiling(
            baseline, candidate, batch_size=settings.batch_size, prompt_tokens=settings.prompt_tokens
        )
    else:
        # The first decode step finds the prompt and one token in the cache, the last one all but one token.
        context = settings.prompt_tokens + settings.output_tokens / 2
        ceiling = decode_ceiling(
            baseline,
            candidate,
            batch_size=settings.batch_size,
            context_tokens=context,
            dtype_bytes=dtype_bytes,
        )
    judgement = judge(claim=settings.claim, low=ratio.low, high=ratio.high, rounds=len(rounds), noise=max(noise))
    return RegimeResult(
        regime=regime,
        batch_size=settings.batch_size,
        context_tokens=context,
        baseline=summarize(baseline_s),
        candidate=summarize(candidate_s),
        ratio=ratio,
        ceiling=ceiling,
        of_ceiling=ratio.median / ceiling,
        baseline_noise=noise[0],
        candidate_noise=noise[1],
        verdict=judgement.verdict,
        reason=judgement.reason,
    )


def conclude(regimes: Sequence[RegimeResult], rounds: Sequence[Round], claim: float) -> tuple[Verdict, str]:
    """One verdict over all regimes, and why: the regimes that decided it, and what stood in the way."""
    verdict = overall([result.verdict for result in regimes])
    parts = []
    for result in regimes:
        if result.verdict is not verdict:
            continue
        ceiling = f"{result.of_ceiling:.0%} of the ceiling {result.ceiling:.3f}"
        if result.ceiling < claim:
            ceiling += f", which is itself below {claim:g}"
        parts.append(f"{result.regime.value}: {result.reason}; the median is {ceiling}")
    others = percentile([pair.other_cpu_share for pair in rounds], 50)
    if others > _TELLING_SHARE:
        parts.append(f"other processes took {others:.0%} of this machine's CPU time meanwhile")
    waiting = percentile([pair.waiting_engine_cpu_share for pair in rounds], 50)
    if waiting > _TELLING_SHARE:
        parts.append(f"the engine whose turn it was not took {waiting:.0%} of a core")
    return verdict, "; ".join(parts)

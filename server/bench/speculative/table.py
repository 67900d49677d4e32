"""A comparison with and without a draft, as lines for people."""

from __future__ import annotations

from pat_serve.server.analysis.statistics import percentile
from pat_serve.server.analysis.verdict import MAX_NOISE
from pat_serve.server.bench.latency.table import milliseconds, wide_console
from pat_serve.server.bench.speculative.result import SpeculativeResult, seconds_per_token


def print_speculative(result: SpeculativeResult) -> None:
    """Print the comparison in a few lines on stdout."""
    plain = percentile([seconds_per_token(one.plain) for one in result.rounds], 50)
    drafted = percentile([seconds_per_token(one.drafted) for one in result.rounds], 50)
    ratio, settings, rounds = result.ratio, result.settings, len(result.rounds)
    lines = [
        f"{result.model} by itself        {milliseconds(plain)} ms a token",
        f"with {result.draft}, {settings.draft_tokens} proposed  {milliseconds(drafted)} ms a token",
        f"speed-up {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], {rounds} paired rounds, spread "
        f"{result.noise.spread:.0%}",
        f"accepted {result.acceptance:.0%} of the proposed tokens, {result.tokens_per_step:.2f} tokens a step",
        f"same output in {result.identical} of {rounds} rounds",
    ]
    if result.noise.spread > MAX_NOISE:
        lines.append("the machine was not quiet: the speed-up says little")
    console = wide_console()
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)

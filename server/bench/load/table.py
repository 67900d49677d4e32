"""A load result as a table for people."""

from __future__ import annotations

from rich.table import Table

from pat_serve.server.bench.latency.table import milliseconds, wide_console
from pat_serve.server.bench.load.result import LATE_S, LoadResult


def print_load(result: LoadResult) -> None:
    """Print a line for each run on stdout."""
    console, settings = wide_console(), result.settings
    slo = ", ".join(f"{name} {bound_s:g} s" for name, bound_s in settings.slo.items())
    console.print(
        f"{result.model} at {settings.url}: {settings.profile}, {settings.prompt_tokens} + {settings.output_tokens} "
        f"tokens, {settings.seconds:g} s a run, guidellm {result.guidellm}"
        + (f"; good is {slo}" if slo else "")
        + "\n",
        markup=False,
        soft_wrap=True,
    )
    table = Table(
        "run", "requests/s", "tokens/s", "in flight", "TTFT p50", "p99", "TPOT p50", "p99", "E2E p50", "good",
        "goodput/s", "errors",
    )  # fmt: skip
    for run in result.runs:
        table.add_row(
            run.name,
            f"{run.requests_per_s:.3g}",
            f"{run.output_tokens_per_s:.4g}",
            f"{run.concurrency:.3g}",
            *((milliseconds(run.ttft.p50), milliseconds(run.ttft.p99)) if run.ttft else ("", "")),
            *((milliseconds(run.tpot.p50), milliseconds(run.tpot.p99)) if run.tpot else ("", "")),
            milliseconds(run.e2e.p50) if run.e2e else "",
            "" if run.good_share is None else f"{run.good_share:.0%}",
            "" if run.goodput_per_s is None else f"{run.goodput_per_s:.3g}",
            str(run.errored),
        )
    console.print(table)
    for run in result.runs:
        if not run.kept_schedule:
            console.print(
                f"{run.name}: one request in twenty was sent {run.late_s:.1f} s late or more, {LATE_S:g} s is fine: "
                "the client was the bottleneck, its figures say little about the server",
                markup=False,
                soft_wrap=True,
            )

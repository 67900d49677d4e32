"""The report's parts that hold measurements. Only extra `bench` has plotly."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pat_serve.server.bench.latency.result import Distribution, LatencyResult, Roof, ThroughputResult
from pat_serve.server.bench.latency.table import beaten_lines, milliseconds, share_of
from pat_serve.server.bench.load.result import LoadResult
from pat_serve.server.bench.report import charts
from pat_serve.server.bench.report.markup import figure_html, section, table_html
from pat_serve.server.bench.speedup.depth_result import Extrapolated
from pat_serve.server.bench.speedup.result import RegimeResult, SpeedupResult
from pat_serve.server.bench.speedup.table import UNCLAIMED, WHOLE_MODELS, claim_line, depth_lines, note_lines


def speedup_section(label: str, result: SpeedupResult, *, many: bool) -> str:
    """Verdict, ratios and noise of one check."""
    rows = [
        _row(one, f"{one.layers} (extrapolated)", one.baseline.total_s, one.candidate.total_s)
        for one in result.extrapolated
    ] + [
        _row(one, str(depth.layers), one.baseline.p50, one.candidate.p50)
        for depth in result.depths
        for one in depth.regimes
    ]
    head = ("regime", "layers", "batch", "context", "baseline ms", "candidate ms", "ratio", "95 % interval", "ceiling",
            "reached", "verdict", "strictly")  # fmt: skip
    average = ""
    if result.average is not None:
        average = (
            f"<p>Prefill averaged over batch sizes (geometric mean): <b>{result.average.median:.3f}</b> "
            f"({result.average.low:.3f} to {result.average.high:.3f}).</p>"
        )
    notes = [*depth_lines(result), *note_lines(result), f"rounds  {result.stopped}"]
    if result.settings.named:
        notes.append(UNCLAIMED)
    whole = f"<p class='note'>{escape(WHOLE_MODELS)}</p>" if result.extrapolated else ""
    advice = "".join(f"<p class='note'>To decide: {escape(line)}</p>" for line in result.advice)
    title = f"Speed-up of {result.candidate.name} over {result.baseline.name}" + (f" ({label})" if many else "")
    return section(
        title,
        f"<p><span class='badge {result.verdict.value}'>{result.verdict.value}</span> "
        f"{escape(claim_line(result))}. {escape(result.reason)}.</p>"
        f"{whole}{advice}"
        f"<div class='two'>{figure_html(charts.ratio_chart(result))}{figure_html(charts.rounds_chart(result))}</div>"
        f"{figure_html(charts.reached_chart(result)) if result.settings.grid else ''}"
        f"{table_html(head, rows, text_columns=(0, 10, 11))}{average}<pre>{escape(chr(10).join(notes))}</pre>",
    )


def _row(one: RegimeResult | Extrapolated, layers: str, baseline_s: float, candidate_s: float) -> tuple[str, ...]:
    """A row of the table: one phase at one depth."""
    return (
        one.regime.value,
        layers,
        one.batches,
        f"{one.context_tokens:g}",
        milliseconds(baseline_s),
        milliseconds(candidate_s),
        f"<b>{one.ratio.median:.3f}</b>",
        f"{one.ratio.low:.3f} to {one.ratio.high:.3f}",
        f"{one.ceiling:.3f}",
        f"{one.of_ceiling:.0%}",
        _verdict(one),
        one.strict_verdict.value,
    )


def _verdict(one: RegimeResult | Extrapolated) -> str:
    told = f"<span class='{one.verdict.value}'>{one.verdict.value}</span>"
    return told if one.claimed else f"({told})"


def latency_section(named: Sequence[tuple[str, LatencyResult]]) -> str:
    """Distributions over the grid, with their floors."""
    if not named:
        return ""
    rows = []
    for label, result in named:
        for cell in result.cells:
            figures: tuple[tuple[str, Distribution | None, Roof | None], ...] = (
                ("TTFT", cell.ttft, cell.ttft_roof),
                ("TPOT", cell.tpot, cell.tpot_roof),
                ("ITL", cell.itl, None),
                ("E2E", cell.e2e, None),
            )
            for name, times, roof in figures:
                if times is not None:
                    rows.append(
                        (
                            escape(label),
                            f"{cell.batch_size} x {cell.prompt_tokens} + {cell.output_tokens}",
                            name,
                            *(milliseconds(value) for value in (times.p50, times.p90, times.p99, times.p99_9)),
                            milliseconds(roof.floor_s) if roof else "",
                            roof.share if roof else "",
                            str(times.count),
                        )
                    )
    head = ("model", "batch x prompt + output", "ms", "p50", "p90", "p99", "p99.9", "floor", "reached", "samples")
    body = (
        f"<div class='two'>{figure_html(charts.latency_chart(named, 'TTFT'))}"
        f"{figure_html(charts.latency_chart(named, 'time between tokens'))}</div>"
        f"{table_html(head, rows, text_columns=(0, 1, 2))}"
        "<p class='note'>The floor is what counted bytes and FLOPs take at least on the probed machine; a percentile "
        "beyond what the number of samples resolves is near the maximum.</p>"
        + "".join(f"<p class='note'>{escape(line)}.</p>" for _, result in named for line in beaten_lines(result))
    )
    return section("Latency of a batch by itself", body)


def throughput_section(named: Sequence[tuple[str, ThroughputResult]]) -> str:
    """Tokens a second over requests in flight."""
    if not named:
        return ""
    rows = [
        (
            escape(label) + (" (saturated)" if run.concurrency == result.saturation else ""),
            str(run.concurrency),
            f"{run.output_tokens_per_s:.4g}",
            f"{run.requests_per_s:.3g}",
            f"{run.roof_tokens_per_s:.4g}" if run.roof_tokens_per_s else "",
            share_of(run.output_tokens_per_s, run.roof_tokens_per_s) if run.roof_tokens_per_s else "",
            milliseconds(run.ttft.p50),
            milliseconds(run.ttft.p99),
            milliseconds(run.tpot.p50) if run.tpot else "",
            milliseconds(run.tpot.p99) if run.tpot else "",
        )
        for label, result in named
        for run in result.runs
    ]
    head = ("model", "in flight", "tokens/s", "requests/s", "ceiling", "reached", "TTFT p50 ms", "p99", "TPOT p50 ms",
            "p99")  # fmt: skip
    return section(
        "Throughput", figure_html(charts.throughput_chart(named)) + table_html(head, rows, text_columns=(0,))
    )


def load_section(named: Sequence[tuple[str, LoadResult]]) -> str:
    """Latency and goodput over the requests that were answered."""
    if not named:
        return ""
    rows = [
        (
            escape(label),
            escape(run.name) + ("" if run.kept_schedule else " (client late)"),
            f"{run.requests_per_s:.3g}",
            f"{run.output_tokens_per_s:.4g}",
            f"{run.concurrency:.3g}",
            *((milliseconds(run.ttft.p50), milliseconds(run.ttft.p99)) if run.ttft else ("", "")),
            *((milliseconds(run.tpot.p50), milliseconds(run.tpot.p99)) if run.tpot else ("", "")),
            "" if run.good_share is None else f"{run.good_share:.0%}",
            "" if run.goodput_per_s is None else f"{run.goodput_per_s:.3g}",
            str(run.errored),
        )
        for label, result in named
        for run in result.runs
    ]
    head = ("model", "run", "requests/s", "tokens/s", "in flight", "TTFT p50 ms", "p99", "TPOT p50 ms", "p99", "good",
            "goodput/s", "errors")  # fmt: skip
    figures = [charts.load_chart(named, "TTFT"), charts.load_chart(named, "TPOT")]
    if any(result.settings.slo for _, result in named):
        figures.append(charts.goodput_chart(named))
    shown = "".join(map(figure_html, figures))
    return section("Latency under load", f"<div class='two'>{shown}</div>{table_html(head, rows, text_columns=(0, 1))}")

"""One self-contained page for any number of results. Only extra `bench` has plotly, whose script the page embeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, TypeVar

from plotly.offline import get_plotlyjs

from pat_serve.machine.hardware import DTYPE_BYTES
from pat_serve.server.bench.latency.result import LatencyResult, ThroughputResult
from pat_serve.server.bench.latency.table import milliseconds
from pat_serve.server.bench.load.result import LoadResult
from pat_serve.server.bench.report import charts
from pat_serve.server.bench.report.markup import figure_html, machine_line, section, table_html
from pat_serve.server.bench.report.read import QualityFigure
from pat_serve.server.bench.report.sections import latency_section, load_section, speedup_section, throughput_section
from pat_serve.server.bench.report.style import STYLE
from pat_serve.server.bench.speculative.result import SpeculativeResult
from pat_serve.server.bench.speedup.depth_result import Extrapolated
from pat_serve.server.bench.speedup.result import SpeedupResult
from pat_serve.server.bench.speedup.table import claim_line, memory_lines

T = TypeVar("T")


def render(results: Sequence[tuple[str, Any]], *, quality: Sequence[QualityFigure] = ()) -> str:
    """The whole page as HTML.

    Args:
        results: each with a label that tells it from the others; one at least.
        quality: figures of a pat-eval report.
    """
    speedups = _of(results, SpeedupResult)
    latencies, throughputs = _of(results, LatencyResult), _of(results, ThroughputResult)
    loads = _of(results, LoadResult)
    sections = [
        _head(results),
        *(speedup_section(label, result, many=len(speedups) > 1) for label, result in speedups),
        latency_section(latencies),
        throughput_section(throughputs),
        load_section(loads),
        _memory(speedups, [*latencies, *throughputs]),
        _quality(quality),
        _method(results),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>pat-bench report</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _of(results: Iterable[tuple[str, Any]], kind: type[T]) -> list[tuple[str, T]]:
    return [(label, result) for label, result in results if isinstance(result, kind)]


def _head(results: Sequence[tuple[str, Any]]) -> str:
    cards = []
    for label, result in results:
        if isinstance(result, SpeedupResult):
            strict = f"; strictly: {result.strict_verdict.value}" if result.settings.margin else ""
            cards.append(
                _card(
                    f"<span class='{result.verdict.value}'>{result.verdict.value}</span>",
                    f"{claim_line(result)}, {label}{strict}",
                )
            )
            shown = [one for one in (result.extrapolated or result.regimes) if one.claimed]
            for regime in shown[:2]:
                whole = f", {regime.layers} layers (extrapolated)" if isinstance(regime, Extrapolated) else ""
                cards.append(
                    _card(
                        f"{regime.ratio.median:.3f}x",
                        f"{regime.regime.value}, batch {regime.batches}{whole}: {regime.of_ceiling:.0%} of the "
                        f"ceiling {regime.ceiling:.3f}",
                    )
                )
        elif isinstance(result, LatencyResult):
            cell = result.cells[0]
            cards.append(_card(f"{milliseconds(cell.ttft.p50)} ms", f"TTFT p50, batch {cell.batch_size}, {label}"))
            if cell.tpot is not None:
                cards.append(_card(f"{milliseconds(cell.tpot.p50)} ms", f"TPOT p50, batch {cell.batch_size}, {label}"))
        elif isinstance(result, ThroughputResult):
            best = max(result.runs, key=lambda run: run.output_tokens_per_s)
            cards.append(_card(f"{best.output_tokens_per_s:.4g} tok/s", f"at {best.concurrency} in flight, {label}"))
        elif isinstance(result, LoadResult):
            goodput = max((run.goodput_per_s or 0.0 for run in result.runs), default=0.0)
            what = "best goodput" if result.settings.slo else "most requests"
            value = goodput if result.settings.slo else max(run.requests_per_s for run in result.runs)
            cards.append(_card(f"{value:.3g} /s", f"{what}, {label}"))
        elif isinstance(result, SpeculativeResult):
            equal = f"{result.identical} of {len(result.rounds)} outputs equal"
            text = f"with a draft, {result.acceptance:.0%} accepted, {equal}, {label}"
            cards.append(_card(f"{result.ratio.median:.3f}x", text))
    dates = sorted({str(result.date)[:16].replace("T", " ") for _, result in results})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    machines = sorted({machine_line(result.machine) for _, result in results})
    lead = f"{when} UTC &middot; {escape(' / '.join(machines))}"
    return f"<h1>pat-bench report</h1><p class='lead'>{lead}</p><div class='cards'>{''.join(cards)}</div>"


def _card(value: str, text: str) -> str:
    return f"<div class='card'><b>{value}</b><span>{escape(text)}</span></div>"


def _memory(
    speedups: Sequence[tuple[str, SpeedupResult]],
    singles: Sequence[tuple[str, LatencyResult | ThroughputResult]],
) -> str:
    bars: dict[str, tuple[int, int]] = {}
    notes: list[str] = []
    for _, result in speedups:
        for model in (result.baseline, result.candidate):
            weights = model.shape.weight_bytes(DTYPE_BYTES[result.dtype])
            bars[model.name] = (weights, model.peak_memory_bytes)
        notes += [line for line in memory_lines(result) if "requests of" in line]
    for label, single in singles:
        bars.setdefault(label, (single.shape.weight_bytes(DTYPE_BYTES[single.dtype]), single.peak_memory_bytes))
    if not bars:
        return ""
    text = "".join(f"<p>I{escape(line.removeprefix('memory  i'))}.</p>" for line in notes)
    return section("Memory", figure_html(charts.memory_chart(bars)) + text)


def _quality(figures: Sequence[QualityFigure]) -> str:
    measures = dict.fromkeys(one.measure for one in figures)
    shown = [
        figure_html(charts.quality_chart(measure, [one for one in figures if one.measure == measure]))
        for measure in measures
    ]
    note = "<p class='note'>Bars with two standard errors, from pat-eval.</p>"
    return section("Quality", f"<div class='two'>{''.join(shown)}</div>{note}") if shown else ""


def _method(results: Sequence[tuple[str, Any]]) -> str:
    rows = []
    for label, result in results:
        machine, settings = result.machine, result.settings
        if isinstance(result, SpeedupResult):
            configs = f"{result.baseline.config_sha256[:12]}, {result.candidate.config_sha256[:12]}"
        else:
            configs = getattr(result, "config_sha256", "")[:12]
        given = ", ".join(
            f"{name} {value}"
            for name, value in settings.model_dump(mode="json", exclude_defaults=True).items()
            if value is not None
        )
        rows.append(
            (
                escape(label),
                escape(result.kind),
                escape(str(result.date)[:16].replace("T", " ")),
                f"{result.duration_s:.0f} s",
                escape(f"{machine_line(machine)}; vLLM {machine['vllm']}, torch {machine['torch']}"),
                configs,
                escape(given or "defaults"),
            )
        )
    head = (
        "result",
        "kind",
        "date (UTC)",
        "took",
        "machine, versions",
        "config sha256",
        "settings beside the defaults",
    )
    note = (
        "<p class='note'>Speed-ups: one process per model, the same random token ids, no end of text, warm-up until "
        "two runs agree (each check says whether they did), interleaved turns (ABBA), ratio of each pair, bootstrap "
        "interval of the median. Raw timestamps of every figure are in the JSON results. docs/benchmarking.md has the "
        "method.</p>"
    )
    return section("How this was measured", table_html(head, rows, text_columns=range(7)) + note)

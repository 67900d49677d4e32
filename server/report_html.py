"""One self-contained page for any number of results. Only extra `bench` has plotly, whose script the page embeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, TypeVar

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from pat_serve.hardware import DTYPE_BYTES
from pat_serve.server import report_charts as charts
from pat_serve.server.load_result import LoadResult
from pat_serve.server.measure_result import Distribution, LatencyResult, Roof, ThroughputResult
from pat_serve.server.measure_table import milliseconds
from pat_serve.server.report_read import QualityFigure
from pat_serve.server.report_style import STYLE
from pat_serve.server.speculative_result import SpeculativeResult
from pat_serve.server.speedup_result import SpeedupResult
from pat_serve.server.speedup_table import memory_lines, noise_line

T = TypeVar("T")
Cells = Sequence[str]


def render(results: Sequence[tuple[str, Any]], *, quality: Sequence[QualityFigure] = ()) -> str:
    """The page.

    Args:
        results: each with a label that tells it from the others; one at least.
        quality: figures of a pat-eval report.
    """
    speedups = _of(results, SpeedupResult)
    latencies, throughputs = _of(results, LatencyResult), _of(results, ThroughputResult)
    loads = _of(results, LoadResult)
    sections = [
        _head(results),
        *(_speedup(label, result, many=len(speedups) > 1) for label, result in speedups),
        _latency(latencies),
        _throughput(throughputs),
        _load(loads),
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
            cards.append(
                _card(
                    f"<span class='{result.verdict.value}'>{result.verdict.value}</span>",
                    f"claim {result.settings.claim:g}x, {label}",
                )
            )
            for regime in result.regimes[:2]:
                cards.append(
                    _card(
                        f"{regime.ratio.median:.3f}x",
                        f"{regime.regime.value}, batch {regime.batch_size}: {regime.of_ceiling:.0%} of the ceiling "
                        f"{regime.ceiling:.3f}",
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
    machines = sorted({_machine(result.machine) for _, result in results})
    lead = f"{when} UTC &middot; {escape(' / '.join(machines))}"
    return f"<h1>pat-bench report</h1><p class='lead'>{lead}</p><div class='cards'>{''.join(cards)}</div>"


def _machine(machine: Mapping[str, Any]) -> str:
    cpu = f"{machine['cpu_model']}, {machine['cpu_cores']} cores"
    return cpu if machine["accelerator"] == "none" else f"{machine['accelerator']}, {cpu}"


def _card(value: str, text: str) -> str:
    return f"<div class='card'><b>{value}</b><span>{escape(text)}</span></div>"


def _speedup(label: str, result: SpeedupResult, *, many: bool) -> str:
    rows = [
        (
            one.regime.value,
            str(one.batch_size)
            if one.batch_size == one.candidate_batch_size
            else f"{one.batch_size} / {one.candidate_batch_size}",
            f"{one.context_tokens:g}",
            milliseconds(one.baseline.p50),
            milliseconds(one.candidate.p50),
            f"<b>{one.ratio.median:.3f}</b>",
            f"{one.ratio.low:.3f} to {one.ratio.high:.3f}",
            f"{one.ceiling:.3f}",
            f"{one.of_ceiling:.0%}",
            f"<span class='{one.verdict.value}'>{one.verdict.value}</span>",
        )
        for one in result.regimes
    ]
    head = ("regime", "batch", "context", "baseline ms", "candidate ms", "ratio", "95 % interval", "ceiling", "reached",
            "verdict")  # fmt: skip
    average = ""
    if result.average is not None:
        average = (
            f"<p>Prefill averaged over batch sizes (geometric mean): <b>{result.average.median:.3f}</b> "
            f"({result.average.low:.3f} to {result.average.high:.3f}).</p>"
        )
    notes = [*(noise_line(one) for one in result.regimes), f"rounds  {result.stopped}"]
    advice = "".join(f"<p class='note'>To decide: {escape(line)}</p>" for line in result.advice)
    title = f"Speed-up of {result.candidate.name} over {result.baseline.name}" + (f" ({label})" if many else "")
    return _section(
        title,
        f"<p><span class='badge {result.verdict.value}'>{result.verdict.value}</span> {escape(result.reason)}.</p>"
        f"{advice}"
        f"<div class='two'>{_figure(charts.ratio_chart(result))}{_figure(charts.rounds_chart(result))}</div>"
        f"{_table(head, rows, text_columns=(0, 9))}{average}<pre>{escape(chr(10).join(notes))}</pre>",
    )


def _latency(named: Sequence[tuple[str, LatencyResult]]) -> str:
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
                            f"{roof.reached:.0%}" if roof else "",
                            str(times.count),
                        )
                    )
    head = ("model", "batch x prompt + output", "ms", "p50", "p90", "p99", "p99.9", "floor", "reached", "samples")
    body = (
        f"<div class='two'>{_figure(charts.latency_chart(named, 'TTFT'))}"
        f"{_figure(charts.latency_chart(named, 'time between tokens'))}</div>"
        f"{_table(head, rows, text_columns=(0, 1, 2))}"
        "<p class='note'>The floor is what counted bytes and FLOPs take at least on the probed machine; a percentile "
        "beyond what the number of samples resolves is near the maximum.</p>"
    )
    return _section("Latency of a batch by itself", body)


def _throughput(named: Sequence[tuple[str, ThroughputResult]]) -> str:
    if not named:
        return ""
    rows = [
        (
            escape(label) + (" (saturated)" if run.concurrency == result.saturation else ""),
            str(run.concurrency),
            f"{run.output_tokens_per_s:.4g}",
            f"{run.requests_per_s:.3g}",
            f"{run.roof_tokens_per_s:.4g}" if run.roof_tokens_per_s else "",
            f"{run.output_tokens_per_s / run.roof_tokens_per_s:.0%}" if run.roof_tokens_per_s else "",
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
    return _section("Throughput", _figure(charts.throughput_chart(named)) + _table(head, rows, text_columns=(0,)))


def _load(named: Sequence[tuple[str, LoadResult]]) -> str:
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
    shown = "".join(map(_figure, figures))
    return _section("Latency under load", f"<div class='two'>{shown}</div>{_table(head, rows, text_columns=(0, 1))}")


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
    text = "".join(f"<p>{escape(line.removeprefix('memory  ').capitalize())}.</p>" for line in notes)
    return _section("Memory", _figure(charts.memory_chart(bars)) + text)


def _quality(figures: Sequence[QualityFigure]) -> str:
    measures = dict.fromkeys(one.measure for one in figures)
    shown = [
        _figure(charts.quality_chart(measure, [one for one in figures if one.measure == measure]))
        for measure in measures
    ]
    note = "<p class='note'>Bars with two standard errors, from pat-eval.</p>"
    return _section("Quality", f"<div class='two'>{''.join(shown)}</div>{note}") if shown else ""


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
                escape(str(result.date)),
                f"{result.duration_s:.0f} s",
                escape(f"{_machine(machine)}; vLLM {machine['vllm']}, torch {machine['torch']}"),
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
        "two runs agree, interleaved turns (ABBA), ratio of each pair, bootstrap interval of the median. Raw "
        "timestamps of every figure are in the JSON results. docs/benchmarking.md has the method.</p>"
    )
    return _section("How this was measured", _table(head, rows, text_columns=range(7)) + note)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _figure(figure: go.Figure) -> str:
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    return f"<div class='figure'>{html}</div>"


def _table(head: Cells, rows: Sequence[Cells], *, text_columns: Iterable[int]) -> str:
    """Columns of numbers are flushed right; cells are HTML already."""
    text = set(text_columns)

    def line(tag: str, cells: Cells) -> str:
        made = (f"<{tag}{'' if index in text else ' class=n'}>{cell}</{tag}>" for index, cell in enumerate(cells))
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<div class='wide'><table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table></div>"

"""The report's charts, as plotly figures from recorded results. Only extra `bench` has plotly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from pat_serve.server.bench.latency.result import LatencyResult, ThroughputResult
from pat_serve.server.bench.load.result import LoadResult
from pat_serve.server.bench.report.read import QualityFigure
from pat_serve.server.bench.speedup.analysis import rounds_of
from pat_serve.server.bench.speedup.depth_result import Extrapolated
from pat_serve.server.bench.speedup.grid import Cell
from pat_serve.server.bench.speedup.result import RegimeResult, SpeedupResult

# Colour-blind readers can tell these colours apart too (Okabe and Ito). The first two are baseline and candidate.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_GREY = "#6b7280"
_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "height": 340,
    "margin": {"l": 64, "r": 24, "t": 30, "b": 52},
    "legend": {"orientation": "h", "y": 1.14, "x": 0},
    "font": {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13, "color": "#1f2937"},
    "hoverlabel": {"font_size": 13},
}


def color(index: int) -> str:
    """The colour of the index-th series."""
    return PALETTE[index % len(PALETTE)]


def ratio_chart(result: SpeedupResult) -> go.Figure:
    """Median paired ratio with its interval for each regime and batch, beside its ceiling and the claim."""
    several = len(result.depths) > 1
    measured = [
        (f"{one.regime.value}, batch {one.batches}" + (f", {depth.layers} layers" if several else ""), one)
        for depth in result.depths
        for one in depth.regimes
    ]
    whole = [(f"{one.regime.value}, batch {one.batches}, {one.layers} (extrapolated)", one)
             for one in result.extrapolated]  # fmt: skip
    shown: list[tuple[str, RegimeResult | Extrapolated]] = [*whole, *measured]
    names, ratios = [name for name, _ in shown], [one.ratio for _, one in shown]
    figure = go.Figure(layout=_LAYOUT)
    for index, (name, one) in enumerate(measured):
        figure.add_scatter(
            x=[name] * one.ratio.rounds, y=one.ratio.ratios, mode="markers", showlegend=index == 0,
            name="each round", marker={"size": 5, "color": _GREY, "opacity": 0.35}, hovertemplate="%{y:.3f}",
        )  # fmt: skip
    figure.add_scatter(
        x=names,
        y=[ratio.median for ratio in ratios],
        error_y={
            "array": [ratio.high - ratio.median for ratio in ratios],
            "arrayminus": [ratio.median - ratio.low for ratio in ratios],
            "width": 10,
            "thickness": 2,
        },
        mode="markers",
        marker={"size": 12, "color": PALETTE[1]},
        name="median, 95 % interval",
    )
    figure.add_scatter(
        x=names,
        y=[one.ceiling for _, one in shown],
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 44, "color": PALETTE[0], "line": {"width": 3}},
        name="ceiling (bytes or FLOPs)",
    )
    claim, threshold = result.settings.claim, result.settings.claimed.threshold
    figure.add_hline(
        y=claim, line={"dash": "dash", "color": "#374151"}, annotation_text=f"claim {claim:g}x",
        annotation_position="top right",
    )  # fmt: skip
    if threshold < claim:
        # An interval that reaches into the band counts as meeting the claim.
        figure.add_hrect(y0=threshold, y1=claim, fillcolor="#374151", opacity=0.12, line_width=0)
    # One stalled round must not squeeze everything else; zooming out still reaches it.
    low = min([threshold, *(ratio.low for ratio in ratios)])
    high = max([claim, *(ratio.high for ratio in ratios), *(one.ceiling for _, one in shown)])
    room = 0.25 * (high - low)
    figure.update_xaxes(range=[-0.6, len(names) - 0.2])
    figure.update_yaxes(title="speed-up", range=[low - room, high + room])
    return figure


def reached_chart(result: SpeedupResult) -> go.Figure:
    """Share of the ceiling that each batch of a grid reaches in both phases, with its interval: measured / ceiling."""
    shown = result.extrapolated or result.regimes
    figure = go.Figure(layout=_LAYOUT | {"barmode": "group"})
    for index, regime in enumerate(result.settings.regimes):
        cells = [one for one in shown if one.regime is regime]
        figure.add_bar(
            x=[one.batches for one in cells], y=[one.of_ceiling for one in cells], name=regime.value,
            marker_color=[color(index) if one.claimed else _GREY for one in cells],
            error_y={
                "array": [(one.ratio.high - one.ratio.median) / one.ceiling for one in cells],
                "arrayminus": [(one.ratio.median - one.ratio.low) / one.ceiling for one in cells],
            },
            text=[f"{one.ratio.median:.2f}x of {one.ceiling:.2f}x" for one in cells],
            textposition="inside", insidetextanchor="start",
        )  # fmt: skip
    figure.add_hline(y=1, line={"dash": "dash", "color": "#374151"}, annotation_text="ceiling")
    figure.update_xaxes(title="requests x prompt tokens", type="category")
    figure.update_yaxes(title="measured / ceiling", rangemode="tozero")
    return figure


def rounds_chart(result: SpeedupResult) -> go.Figure:
    """Each model's durations round by round, in which drift and stalls are seen."""
    figure = go.Figure(layout=_LAYOUT)
    regime = result.regimes[-1]
    prompt = regime.prompt_tokens or result.settings.prompt_tokens
    rounds = rounds_of(result.rounds, Cell(batch_size=regime.batch_size, prompt_tokens=prompt))
    decode = regime.regime.value == "decode"
    for index, (role, name) in enumerate((("baseline", result.baseline.name), ("candidate", result.candidate.name))):
        traces = [getattr(one, role) for one in rounds]
        figure.add_scatter(
            y=[1000 * (trace.tpot_s if decode else trace.ttft_s) for trace in traces],
            mode="lines+markers",
            name=name,
            line={"color": color(index), "width": 2},
        )
    figure.update_xaxes(title="round")
    figure.update_yaxes(title=f"{regime.regime.value}, batch {regime.batches} (ms)", rangemode="tozero")
    return figure


def memory_chart(named: Mapping[str, tuple[int, int]]) -> go.Figure:
    """Weights and the process's peak, GiB, for each model."""
    figure = go.Figure(layout=_LAYOUT | {"barmode": "group"})
    for index, label in enumerate(("weights", "process peak (host)")):
        values = [pair[index] / 2**30 for pair in named.values()]
        figure.add_bar(
            x=list(named), y=values, name=label, marker_color=color(index), width=0.28,
            text=[f"{value:.2f}" for value in values], textposition="outside", cliponaxis=False,
        )  # fmt: skip
    figure.update_yaxes(title="GiB", rangemode="tozero")
    return figure


def latency_chart(named: Sequence[tuple[str, LatencyResult]], figure_name: str) -> go.Figure:
    """Distribution of TTFT or of the time between tokens, over the cells, a box for each model."""
    figure = go.Figure(layout=_LAYOUT | {"boxmode": "group", "scattermode": "group"})
    for index, (name, result) in enumerate(named):
        x: list[str] = []
        y: list[float] = []
        floors: dict[str, float] = {}
        for cell in result.cells:
            label = f"{cell.batch_size} x {cell.prompt_tokens} + {cell.output_tokens}"
            roof = cell.ttft_roof if figure_name == "TTFT" else cell.tpot_roof
            samples = (
                [trace.ttft_s for trace in cell.traces]
                if figure_name == "TTFT"
                else [step_s for trace in cell.traces for step_s in trace.decode_steps_s]
            )
            x += [label] * len(samples)
            y += [1000 * sample for sample in samples]
            if roof is not None:
                floors[label] = 1000 * roof.floor_s
        figure.add_box(
            x=x, y=y, name=name, marker_color=color(index), boxpoints="outliers", offsetgroup=str(index), line_width=1.5
        )
        if floors:
            figure.add_scatter(
                x=list(floors), y=list(floors.values()), mode="markers", name=f"floor of {name}",
                offsetgroup=str(index),
                marker={"symbol": "line-ew-open", "size": 30, "color": color(index), "line": {"width": 2}},
            )  # fmt: skip
    figure.update_xaxes(title="batch x prompt + output tokens")
    figure.update_yaxes(title=f"{figure_name} (ms)", rangemode="tozero")
    return figure


def throughput_chart(named: Sequence[tuple[str, ThroughputResult]]) -> go.Figure:
    """Tokens a second over requests in flight, with the ceiling."""
    figure = go.Figure(layout=_LAYOUT)
    for index, (name, result) in enumerate(named):
        x = [run.concurrency for run in result.runs]
        figure.add_scatter(
            x=x, y=[run.output_tokens_per_s for run in result.runs], mode="lines+markers", name=name,
            line={"color": color(index), "width": 2},
        )  # fmt: skip
        if any(run.roof_tokens_per_s for run in result.runs):
            figure.add_scatter(
                x=x, y=[run.roof_tokens_per_s for run in result.runs], mode="lines", name=f"ceiling of {name}",
                line={"color": color(index), "width": 1, "dash": "dot"},
            )  # fmt: skip
    ticks = sorted({run.concurrency for _, result in named for run in result.runs})
    figure.update_xaxes(title="requests in flight", type="log", tickvals=ticks, ticktext=[str(tick) for tick in ticks])
    figure.update_yaxes(title="output tokens / s", rangemode="tozero")
    return figure


def load_chart(named: Sequence[tuple[str, LoadResult]], figure_name: str) -> go.Figure:
    """p50 and p99 of TTFT or TPOT over the requests that were answered a second."""
    figure = go.Figure(layout=_LAYOUT)
    bounds = set()
    for index, (name, result) in enumerate(named):
        points = sorted(
            (run.requests_per_s, 1000 * times.p50, 1000 * times.p99)
            for run in result.runs
            if (times := run.ttft if figure_name == "TTFT" else run.tpot) is not None
        )
        for column, label, dash in ((1, "p50", "solid"), (2, "p99", "dot")):
            figure.add_scatter(
                x=[point[0] for point in points], y=[point[column] for point in points], mode="lines+markers",
                name=f"{name}, {label}", line={"color": color(index), "width": 2, "dash": dash},
            )  # fmt: skip
        bounds |= {bound for bound in [result.settings.slo.get(figure_name.lower())] if bound is not None}
    for bound_s in sorted(bounds):
        figure.add_hline(
            y=1000 * bound_s,
            line={"dash": "dash", "color": "#374151"},
            annotation_text=f"bound {1000 * bound_s:g} ms",
            annotation_position="top left",
        )
    figure.update_xaxes(title="requests answered / s", rangemode="tozero")
    figure.update_yaxes(title=f"{figure_name} (ms)", rangemode="tozero")
    return figure


def goodput_chart(named: Sequence[tuple[str, LoadResult]]) -> go.Figure:
    """Good requests a second over answered ones; a server that keeps its bounds stays on the diagonal."""
    figure = go.Figure(layout=_LAYOUT)
    most = 0.0
    for index, (name, result) in enumerate(named):
        points = sorted((run.requests_per_s, run.goodput_per_s or 0.0) for run in result.runs)
        most = max([most, *(point[0] for point in points)])
        figure.add_scatter(
            x=[point[0] for point in points], y=[point[1] for point in points], mode="lines+markers", name=name,
            line={"color": color(index), "width": 2},
        )  # fmt: skip
    figure.add_scatter(
        x=[0, most], y=[0, most], mode="lines", name="all good", line={"color": _GREY, "width": 1, "dash": "dot"}
    )
    figure.update_xaxes(title="requests answered / s", rangemode="tozero")
    figure.update_yaxes(title="good requests / s", rangemode="tozero")
    return figure


def quality_chart(measure: str, figures: Sequence[QualityFigure]) -> go.Figure:
    """One measure of quality with two standard errors."""
    figure = go.Figure(layout=_LAYOUT | {"showlegend": False})
    figure.add_bar(
        x=[one.model for one in figures],
        y=[one.value for one in figures],
        error_y={"array": [2 * (one.standard_error or 0.0) for one in figures]},
        marker_color=[color(index) for index in range(len(figures))],
        width=0.35,
        text=[f"{one.value:.4g}" for one in figures],
        textposition="inside",
        insidetextanchor="start",
    )
    figure.update_yaxes(title=measure, rangemode="tozero")
    return figure

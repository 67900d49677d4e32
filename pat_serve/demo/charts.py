"""The report's charts, as plotly figures from measured values."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

COLORS = {"base": "#8a94a6", "dense": "#3b6fd4", "lora": "#3b6fd4", "pruned": "#d4663b", "pat": "#d4663b"}
_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "height": 320,
    "margin": {"l": 60, "r": 50, "t": 20, "b": 50},
    "legend": {"orientation": "h", "y": 1.12, "x": 0},
    "font": {"family": "system-ui, sans-serif", "size": 13},
}


def loss_chart(training: dict[str, list[dict[str, float]]]) -> go.Figure:
    """Draw the cross-entropy of both methods over the steps."""
    figure = go.Figure(layout=_LAYOUT)
    for method, title in (("lora", "LoRA, dense"), ("pat", "PAT, pruning")):
        lines = training[method]
        figure.add_scatter(
            x=[line["step"] for line in lines],
            y=[line["cross_entropy"] for line in lines],
            name=title,
            line={"color": COLORS[method], "width": 2},
        )
    figure.update_xaxes(title="optimizer step")
    figure.update_yaxes(title="training cross-entropy (nats)")
    return figure


def losses_chart(lines: list[dict[str, float]]) -> go.Figure:
    """Draw the terms of one run's loss over its steps."""
    figure = go.Figure(layout=_LAYOUT)
    for term, title, color in (
        ("cross_entropy", "cross-entropy", COLORS["pat"]),
        ("distillation", "KL to the parent", COLORS["dense"]),
    ):
        known = [line for line in lines if term in line]
        if known:
            figure.add_scatter(
                x=[line["step"] for line in known],
                y=[line[term] for line in known],
                name=title,
                line={"color": color, "width": 2},
            )
    figure.update_xaxes(title="optimizer step")
    figure.update_yaxes(title="nats per token", rangemode="tozero")
    return figure


def axes_chart(importances: list[float], kept: int) -> go.Figure:
    """Draw the importance of the stream's axes, the strongest first, and the place of the cut."""
    figure = go.Figure(layout=_LAYOUT)
    for name, color, first, last in (
        ("kept", COLORS["pat"], 0, kept),
        ("cut", COLORS["base"], kept, len(importances)),
    ):
        figure.add_bar(
            x=list(range(first, last)), y=importances[first:last], name=name, marker={"color": color, "line_width": 0}
        )
    figure.update_layout(
        bargap=0,
        xaxis={"title": "axis of the residual stream"},
        yaxis={"title": "share of energy and sensitivity", "type": "log"},
    )
    return figure


def speedup_chart(speedup: dict[str, Any]) -> go.Figure:
    """Draw the median paired ratio with its interval, the ceiling and the claim."""
    figure = go.Figure(layout=_LAYOUT)
    regimes = speedup["regimes"]
    names = [regime["regime"] for regime in regimes]
    ratios = [regime["ratio"] for regime in regimes]
    figure.add_scatter(
        x=names,
        y=[ratio["median"] for ratio in ratios],
        error_y={
            "array": [ratio["high"] - ratio["median"] for ratio in ratios],
            "arrayminus": [ratio["median"] - ratio["low"] for ratio in ratios],
            "width": 12,
        },
        mode="markers",
        marker={"size": 12, "color": COLORS["pat"]},
        name="measured, 95 % interval",
    )
    figure.add_scatter(
        x=names,
        y=[regime["ceiling"] for regime in regimes],
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 40, "color": "#6b7280", "line": {"width": 3}},
        name="ceiling (bytes or FLOPs)",
    )
    claim = speedup["settings"]["claim"]
    figure.add_hline(y=claim, line={"dash": "dash", "color": "#374151"}, annotation_text=f"claim {claim}x")
    figure.update_yaxes(title="speed-up over the dense model")
    return figure


def quality_chart(quality: dict[str, dict[str, Any]]) -> go.Figure:
    """Draw the held-out perplexity with two standard errors."""
    figure = go.Figure(layout=_LAYOUT | {"showlegend": False})
    names = list(quality)
    values = [quality[name]["perplexity"] for name in names]
    # At these widths exp is nearly straight, so both sides of the interval are about the same.
    errors = [2 * quality[name]["nll_standard_error_nats"] * quality[name]["perplexity"] for name in names]
    figure.add_bar(
        x=names, y=values, error_y={"array": errors}, marker={"color": [COLORS[name] for name in names]},
        text=[f"{value:.2f}" for value in values], textposition="inside", insidetextanchor="start",
    )  # fmt: skip
    figure.update_yaxes(title="perplexity of held-out responses", rangemode="tozero")
    return figure

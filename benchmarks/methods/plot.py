"""The rows as a picture: perplexity against the measured speed of a decoded token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A row that has lost everything would press all others into a corner.
_MOST_TIMES_THE_DENSE = 4.0
# Labels of points nearer than this, in speed and as a share of perplexity, stand on either side.
_NEAR = 0.05


def write_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A self-contained page with a point for every row whose speed is known; bars are 95 % intervals.

    Args:
        rows: figures of the table's rows, the dense model's among them.
        path: of the page.
    """
    import plotly.graph_objects as go

    perplexity_of = {row["name"]: row["measures"]["ppl(wikitext2)"] for row in rows}
    dense = perplexity_of["dense"]
    shown = [row for row in rows if "speed" in row and perplexity_of[row["name"]] <= _MOST_TIMES_THE_DENSE * dense]
    figure = go.Figure(
        layout={
            "template": "plotly_white",
            "margin": {"t": 20, "r": 20},
            "xaxis": {"title": "decode in vLLM, times the dense model's speed", "range": [0.98, None]},
            "yaxis": {"title": "perplexity of WikiText-2", "type": "log"},
            "width": 900,
            "height": 520,
        }
    )
    same = {"median": 1.0, "low": 1.0, "high": 1.0}
    last = (0.0, 0.0)
    for row in sorted(shown, key=lambda row: perplexity_of[row["name"]]):
        speed = row["speed"].get("decode", same)
        here = (speed["median"], perplexity_of[row["name"]])
        is_near = abs(here[0] - last[0]) < _NEAR and here[1] < (1 + _NEAR) * last[1]
        last = here
        figure.add_scatter(
            x=[speed["median"]],
            y=[perplexity_of[row["name"]]],
            error_x={"array": [speed["high"] - speed["median"]], "arrayminus": [speed["median"] - speed["low"]]},
            mode="markers+text",
            text=[row["name"]],
            textposition="middle right" if speed is same else "top center" if is_near else "bottom center",
            showlegend=False,
        )
    path.write_text(figure.to_html(include_plotlyjs=True, config={"displayModeBar": False}), encoding="utf-8")

"""The report as one self-contained HTML page: plotly's code is in it, and nothing is fetched."""

from __future__ import annotations

from html import escape
from typing import Any

from pat_serve.evaluation.gate import describe
from pat_serve.evaluation.report import Measure, Report
from pat_serve.evaluation.table import cells, short_names
from pat_serve.machine.extras import require

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2937; max-width: 1040px; margin: 2.5rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
.soft { color: #6b7280; font-size: .92rem; } .pass { color: #15803d; } .fail { color: #b91c1c; }
.inconclusive { color: #a16207; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid #e5e7eb; font-variant-numeric: tabular-nums; }
"""


def require_plotly() -> None:
    """Check that plotly is installed, which `render` needs.

    Raises:
        MissingExtra: plotly is not installed.
    """
    require("plotly", "bench", wanted_by="--html", otherwise="leave --html out")


def render(report: Report) -> str:
    """Render the report as an HTML page.

    Raises:
        MissingExtra: plotly is not installed.
    """
    require_plotly()
    names = ", ".join(escape(model.name) for model in report.models)
    sections = [
        f"<h1>What was kept of {escape(report.models[0].name)}</h1>",
        f"<p class='soft'>{escape(report.date)}, pat-serve {escape(report.pat_serve)}, "
        f"{escape(str(report.machine.get('cpu_model', '')))}. Models: {names}. The first is the reference.</p>",
        _gate(report),
        _chart(report),
        *(_measure(measure) for measure in report.measures),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>pat-eval report</title><style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _gate(report: Report) -> str:
    lines = "".join(f"<li class='{bound.outcome}'>{escape(describe(bound))}</li>" for bound in report.gate)
    return f"<h2>Gate</h2><ul>{lines}</ul>" if lines else ""


def _chart(report: Report) -> str:
    """Chart how much each model kept of the first, in percent, with its interval."""
    import plotly.graph_objects as go

    layout: dict[str, Any] = {
        "template": "plotly_white",
        "height": 380,
        "margin": {"l": 60, "r": 30, "t": 20, "b": 60},
        "legend": {"orientation": "h", "y": 1.12, "x": 0},
        "yaxis": {"title": "kept of the first model (%)"},
    }
    figure = go.Figure(layout=layout)
    names = short_names([model.name for model in report.models])
    for number, model in enumerate(report.models[1:], start=1):
        points = [
            (measure.name, *_kept(measure, number))
            for measure in report.measures
            if measure.results[number].retention_percent is not None
        ]
        if points:
            titles, kept, low, high = zip(*points, strict=True)
            figure.add_scatter(
                x=titles,
                y=kept,
                error_y={
                    "array": [top - value for top, value in zip(high, kept, strict=True)],
                    "arrayminus": [value - bottom for bottom, value in zip(low, kept, strict=True)],
                },
                mode="markers",
                marker={"size": 10},
                name=names[model.name],
            )
    if not figure.data:
        return ""
    figure.add_hline(y=100, line={"dash": "dash", "color": "#6b7280"})
    chart = str(figure.to_html(full_html=False, include_plotlyjs=True, config={"displayModeBar": False}))
    return f"<h2>Retention, 95 % intervals</h2>{chart}"


def _kept(measure: Measure, number: int) -> tuple[float, float, float]:
    result = measure.results[number]
    assert result.versus_first is not None
    assert result.retention_percent is not None
    ends = [end for end in (result.versus_first.low, result.versus_first.high) if end is not None]
    if len(ends) < 2 or not (measure.higher_is_better or all(ends)):
        return (result.retention_percent,) * 3
    low, high = sorted(100 * (end if measure.higher_is_better else 1 / end) for end in ends)
    return result.retention_percent, low, high


def _measure(measure: Measure) -> str:
    head = "".join(
        f"<th>{title}</th>" for title in ("model", "value ± s.e.", "kept", "to the first (95 %)", "p", "items")
    )
    names = short_names([result.model for result in measure.results])
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in [names[result.model], *cells(measure, result)])
        + "</tr>"
        for result in measure.results
    )
    # Hashes are for the cache and the JSON, not for a reader.
    shown = {key: value for key, value in measure.settings.items() if value is not None and len(str(value)) < 32}
    settings = ", ".join(f"{key} {value}" for key, value in shown.items())
    notes = "".join(f"<p class='soft'>{escape(note)}</p>" for note in measure.notes)
    return (
        f"<h2>{escape(measure.name)}</h2><p class='soft'>{escape(settings)}</p>"
        f"<div class='wide'><table><tr>{head}</tr>{rows}</table></div>{notes}"
    )

"""Parts of a report: one self-contained page, its tables, notes and charts."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

import plotly.graph_objects as go

STYLE = """
:root { color-scheme: light; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); max-width: 1040px; margin: 2.5rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p.lead, .note { color: var(--soft); } .note { font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: .9rem; margin: 1.4rem 0; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1rem; }
.card b { display: block; font-size: 1.45rem; } .card > span { color: var(--soft); font-size: .88rem; }
.pass { color: #15803d; } .fail { color: #b91c1c; } .inconclusive { color: #a16207; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { text-align: left; padding: .45rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f6f7f9; border-radius: 8px; padding: .6rem .8rem; overflow-x: auto; font-size: .85rem; margin: 0; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
@media (max-width: 900px) { .two { grid-template-columns: 1fr; } }
.two > * { min-width: 0; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; } td small { color: var(--soft); }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """Make the whole HTML document from a title and the body's parts."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def cards(items: Iterable[tuple[str, str]]) -> str:
    """Show figures in large type, each with its meaning; both may be markup."""
    html = "".join(f"<div class='card'><b>{value}</b><span>{title}</span></div>" for value, title in items)
    return f"<div class='cards'>{html}</div>"


class Html(str):
    """A cell that is markup already."""


def table(headers: list[str], rows: list[list[Any]]) -> str:
    """Make a table; a header that begins with # marks a column of numbers, aligned to the right."""
    numeric = [header.startswith("#") for header in headers]

    def line(tag: str, cells: list[Any]) -> str:
        tagged = [
            f"<{tag}{' class=n' if right else ''}>{cell if isinstance(cell, Html) else escape(str(cell))}</{tag}>"
            for right, cell in zip(numeric, cells, strict=True)
        ]
        return f"<tr>{''.join(tagged)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table>{line('th', [header.lstrip('#') for header in headers])}{body}</table>"


def colored(verdict: str) -> str:
    """Show a verdict in its own colour."""
    return f"<span class='{escape(verdict)}'>{escape(verdict)}</span>"


def note(text: str) -> str:
    """Make a paragraph in small type."""
    return f"<p class='note'>{escape(text)}</p>"


def plain(value: Any) -> str:
    """Show a value as the text of a cell."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def ms(seconds: float) -> str:
    """Show seconds as milliseconds, for a cell."""
    return f"{seconds * 1e3:.2f}"


def measured_ratio(regime: dict[str, Any]) -> list[Any]:
    """Make the cells of one regime: both medians, the ratio with its interval, ceiling, verdict and reason."""
    ratio = regime["ratio"]
    return [
        ms(regime["baseline"]["median"]),
        ms(regime["candidate"]["median"]),
        f"{ratio['median']:.3f}x [{ratio['low']:.3f}, {ratio['high']:.3f}]",
        f"{regime['ceiling']:.3f}x",
        Html(colored(regime["verdict"])),
        regime["reason"],
    ]


def figure(figure: go.Figure, *, first_on_page: bool = False) -> str:
    """Embed a chart; the first one brings plotly's script along, so that the page needs no network."""
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=first_on_page, config={"displayModeBar": False, "responsive": True}
    )
    return html

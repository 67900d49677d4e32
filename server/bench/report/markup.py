"""The report's building blocks as HTML. Only extra `bench` has plotly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

Cells = Sequence[str]


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine that was measured on, in a line."""
    cpu = f"{machine['cpu_model']}, {machine['cpu_cores']} cores"
    return cpu if machine["accelerator"] == "none" else f"{machine['accelerator']}, {cpu}"


def section(title: str, body: str) -> str:
    """A part of the page; `body` is HTML already."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def figure_html(figure: go.Figure) -> str:
    """A chart; the page has plotly's script in its head."""
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    return f"<div class='figure'>{html}</div>"


def table_html(head: Cells, rows: Sequence[Cells], *, text_columns: Iterable[int]) -> str:
    """Columns of numbers are flushed right; cells are HTML already."""
    text = set(text_columns)

    def line(tag: str, cells: Cells) -> str:
        made = (f"<{tag}{'' if index in text else ' class=n'}>{cell}</{tag}>" for index, cell in enumerate(cells))
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<div class='wide'><table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table></div>"

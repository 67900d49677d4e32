"""Two or more results side by side, as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel
from rich.table import Table

from pat_serve.server.bench.latency.table import milliseconds, wide_console
from pat_serve.server.bench.report.read import QualityFigure
from pat_serve.server.bench.report.rows import Row, rows_of
from pat_serve.server.bench.speedup.result import SpeedupResult
from pat_serve.server.bench.speedup.table import verdict_line


def compared(results: Sequence[tuple[str, BaseModel]]) -> list[tuple[Row, list[Row | None]]]:
    """The figures that the results share, or that only some have: each with one column for every result.

    Returns:
        rows in the order of first appearance: each gives kind, point and figure, and every result's own row, or None.
        The two models of a speed-up check stand in one result, so their durations are kept apart by name.
    """
    table: dict[tuple[str, str, str, str], list[Row | None]] = {}
    heads: dict[tuple[str, str, str, str], Row] = {}
    for column, (_, result) in enumerate(results):
        for row in rows_of(result):
            name = row.model if row.kind == "speedup" else ""
            key = (row.kind, row.where, row.figure, name)
            heads.setdefault(key, row)
            table.setdefault(key, [None] * len(results))[column] = row
    return [(heads[key], columns) for key, columns in table.items()]


def print_comparison(results: Sequence[tuple[str, BaseModel]], quality: Sequence[QualityFigure]) -> None:
    """Print every figure with a column a result, each column's ratio to the first, and every verdict, on stdout."""
    console = wide_console()
    table = Table("", "figure", *(label for label, _ in results))
    before = None
    for head, columns in compared(results):
        point = (head.kind, head.where)
        if before is not None and point != before:
            table.add_section()
        name = f"{head.figure}, {head.model}" if head.kind == "speedup" else head.figure
        first = columns[0]
        cells = [
            "" if row is None else shown(row) + (_against(first, row) if column and first is not None else "")
            for column, row in enumerate(columns)
        ]
        table.add_row(head.where if point != before else "", name, *cells)
        before = point
    console.print(table)
    for label, result in results:
        if isinstance(result, SpeedupResult):
            console.print(f"{label}  {verdict_line(result)}", markup=False)
    for one in quality:
        error = "" if one.standard_error is None else f" ± {one.standard_error:.2g}"
        console.print(f"{one.measure}  {one.model}: {one.value:.4g}{error}", markup=False)


def shown(row: Row) -> str:
    """A figure with its unit and its share of the ceiling."""
    if row.unit == "s":
        text = f"{milliseconds(row.value)} ms"
    elif row.unit == "bytes":
        text = f"{row.value / 2**20:,.1f} MiB"
    elif row.unit == "1/s":
        text = f"{row.value:.4g}/s"
    else:
        text = f"{row.value:.4g}"
    if row.low is not None and row.high is not None:
        scale = 1000 if row.unit == "s" else 1
        text += f" ({scale * row.low:.3f} to {scale * row.high:.3f})"
    return text + (f", {row.reached:.0%} of ceiling" if row.reached is not None else "")


def _against(first: Row, row: Row) -> str:
    return f", x {row.value / first.value:.3f}" if first.value else ""

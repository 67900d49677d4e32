"""Shapes side by side as text: what each saves, how fast it can be, and what is in its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pat_serve.cut.axes import HIDDEN
from pat_serve.server.analysis.shape_figures import LoadFigures, ShapeFigures
from pat_serve.shapes.geometry import count_parameters
from pat_serve.shapes.shape import shape_text


def shape_lines(
    base: ShapeFigures, shapes: Sequence[ShapeFigures], *, picked: int | None = None, tied: bool = False
) -> list[str]:
    """A table with a line for each shape, and below it the sentences on some of them.

    Args:
        base: figures of the whole model.
        shapes: the others.
        picked: place of the shape that was chosen.
        tied: the base is tied, so that a cut of the stream says what becomes of the tie.
    """
    loads = [figures.load for figures in base.loads]
    expected = base.loads[0].decode_speedup is not None
    groups: list[tuple[str, Callable[[LoadFigures], float | None]]] = [
        ("decode ceiling", lambda one: one.decode_ceiling),
        ("prefill ceiling", lambda one: one.prefill_ceiling),
    ]
    if expected:
        groups += [
            ("decode expected", lambda one: one.decode_speedup),
            ("prefill expected", lambda one: one.prefill_speedup),
        ]
    head = ["", "shape", "parameters", "cut", f"MB/token {loads[0]}", "KV KiB/token"]
    rows = [head + [str(load) for _ in groups for load in loads]]
    for number, one in enumerate((base, *shapes)):
        label = shape_text(one.counts) or "(whole)"
        if tied and HIDDEN in one.counts:
            label += " untied" if one.unties else " tied"
        mark = "" if number == 0 else f"{number}" + ("*" if number - 1 == picked else "")
        figures = [pick(under) for _, pick in groups for under in one.loads]
        rows.append(
            [
                mark,
                label,
                count_parameters(one.parameters),
                f"{one.share:.1%}",
                f"{one.loads[0].bytes_per_token / 1e6:.1f}",
                f"{one.kv_bytes_per_token / 1024:.1f}",
                *(f"{figure:.3f}" for figure in figures if figure is not None),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    titles = " " * sum(width + 2 for width in widths[: len(head)])
    for at, (name, _) in enumerate(groups):
        start = len(head) + at * len(loads)
        widths[start] += max(0, len(name) + 2 - sum(width + 2 for width in widths[start : start + len(loads)]))
        titles += name.ljust(sum(width + 2 for width in widths[start : start + len(loads)]))
    lines = [titles.rstrip()]
    for row in rows:
        cells = [
            cell.ljust(width) if column in (0, 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    remarks = [line for number, one in enumerate(shapes, 1) for line in _remarks(number, one, base)]
    return lines + (["", *remarks] if remarks else [])


def _remarks(number: int, one: ShapeFigures, base: ShapeFigures) -> list[str]:
    said = [f"not served: {obstacle}" if obstacle.startswith("--tp") else obstacle for obstacle in one.obstacles]
    if one.architecture not in (None, base.architecture):
        said.append(f"written as {one.architecture}, which computes the same")
    # A slowness that the base has too is no fault of the cut.
    said += [caution for caution in one.cautions if caution not in base.cautions]
    return [f"{number}: {text}" for text in said]

"""pat-bench compare: put recorded results side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pat_serve.cli.app import Debug
from pat_serve.cli.bench.options import Force, Html, check_outputs
from pat_serve.errors import UsageError


def compare(
    results: Annotated[list[Path], typer.Argument(help="JSON files of pat-bench, of any kind.")],
    label: Annotated[
        list[str] | None, typer.Option(help="Name of a result, in the order of the files. [default: file names]")
    ] = None,
    quality: Annotated[Path | None, typer.Option(help="Report that pat-eval --json wrote.")] = None,
    html: Html = None,
    csv: Annotated[Path | None, typer.Option(help="Also write every figure to this CSV file.")] = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Put recorded results side by side: a table, CSV, and one page with charts.

    Example:

        pat-bench compare dense.json pruned.json --label dense --label pruned --html report.html
    """
    from pat_serve.files.atomic import write_text
    from pat_serve.server.bench.report.compare_table import print_comparison
    from pat_serve.server.bench.report.read import read_quality, read_result
    from pat_serve.server.bench.report.rows import csv_text

    labels = list(label or ())
    if labels and len(labels) != len(results):
        raise UsageError(
            "--label", expected=f"{len(results)}, one a file", found=str(len(labels)), fix="Name each, or none."
        )
    labels = labels or [path.stem for path in results]
    if len(set(labels)) != len(labels):
        raise UsageError(
            "--label", expected="names that differ", found=", ".join(labels), fix="Give each file its own --label."
        )
    check_outputs(html, csv, force=force)
    read = [(name, read_result(path)) for name, path in zip(labels, results, strict=True)]
    figures = read_quality(quality) if quality is not None else []
    if csv is not None:
        write_text(csv, csv_text(result for _, result in read))
    if html is not None:
        from pat_serve.server.bench.report.html_page import render

        write_text(html, render(read, quality=figures))
    print_comparison(read, figures)

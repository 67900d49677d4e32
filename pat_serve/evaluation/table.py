"""The report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from pat_serve.evaluation.gate import describe
from pat_serve.evaluation.report import Measure, Report, Result

# The width for a file or a pipe, which has none of its own.
_PLAIN_WIDTH = 140
# These figures are no shares.
_NUMBERS = ("ppl", "answer_nll", "length", "first_divergence", "kl")


def print_report(report: Report, console: Console | None = None) -> None:
    """Print one table for a report: a row for each measure and model, with each model against the first."""
    if console is None:
        console = Console() if Console().is_terminal else Console(width=_PLAIN_WIDTH)
    # A name that is cut short could be that of another task.
    named = [Column(name, overflow="fold") for name in ("measure", "model")]
    table = Table(*named, "value ± s.e.", "kept", "to the first (95 %)", "p", "items")
    names = short_names([model.name for model in report.models])
    for measure in report.measures:
        for number, result in enumerate(measure.results):
            table.add_row(measure.name if number == 0 else "", names[result.model], *cells(measure, result))
        table.add_section()
    console.print(table)
    for measure in report.measures:
        for note in measure.notes:
            console.print(f"{measure.name}: {note}", markup=False, highlight=False, soft_wrap=True)
    for bound in report.gate:
        console.print(describe(bound), markup=False, highlight=False, soft_wrap=True)


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Shorten the models' names to their last parts, where these tell the models apart."""
    last = [model.rstrip("/").rsplit("/", 1)[-1] for model in models]
    return dict(zip(models, last if len(set(last)) == len(models) else models, strict=True))


def cells(measure: Measure, result: Result) -> list[str]:
    """Cells of a row: value ± standard error, retention, ratio with its interval, p-value, items."""
    form = "{:.3f}" if measure.metric in _NUMBERS else "{:.4f}"
    value = form.format(result.value)
    if result.standard_error is not None:
        value += f" ± {form.format(result.standard_error)}"
    kept = "" if result.retention_percent is None else f"{result.retention_percent:.1f} %"
    versus, ratio, p_value = result.versus_first, "", ""
    if versus is not None and versus.ratio is not None:
        ratio = f"{versus.ratio:.4f}x"
        if versus.low is not None and versus.high is not None:
            ratio += f" ({versus.low:.4f} to {versus.high:.4f})"
    if versus is not None and versus.p_value is not None:
        p_value = f"{versus.p_value:.2g}"
    return [value, kept, ratio, p_value, str(result.items)]

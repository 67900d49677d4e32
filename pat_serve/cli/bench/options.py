"""Options and output that the benchmark commands share: lists, progress, and the places of a result."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pat_serve.errors import UsageError
from pat_serve.machine.extras import require

if TYPE_CHECKING:
    from pydantic import BaseModel

Json = Annotated[bool, typer.Option("--json", help="Print the whole result as JSON, and nothing else.")]
Out = Annotated[
    Path | None, typer.Option(help="Also write the result to this file: as CSV if its name ends in .csv, else as JSON.")
]
Html = Annotated[Path | None, typer.Option(help="Also write a page with charts to this file; extra bench.")]
Force = Annotated[bool, typer.Option("--force", help="Replace --out and --html if they exist.")]

PromptTokens = Annotated[int, typer.Option(help="Tokens of each prompt.")]
OutputTokens = Annotated[int, typer.Option(help="Tokens that each request generates.")]
RoundPairs = Annotated[int, typer.Option(help="Pairs of runs, at least 5.")]
LayersOfBoth = Annotated[int | None, typer.Option(help="Number of layers to cut both models to; random weights only.")]
LoadFormat = Annotated[
    str, typer.Option(help="auto takes real weights, dummy random ones, for which a config.json is enough.")
]
Roofline = Annotated[bool, typer.Option(help="Probe the machine (5 s) and put the ceiling beside each figure.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


def engine_settings(
    *, layers: int | None, load_format: str, dtype: str, enforce_eager: bool, seed: int
) -> dict[str, object]:
    """Collect the settings of engines, which all benchmarks that start engines have.

    Raises:
        UsageError: there is no such load format.
    """
    [load_format] = choices("--load-format", [load_format], ("auto", "dummy"))
    return {
        "layers": layers,
        "load_format": load_format,
        "dtype": dtype,
        "enforce_eager": enforce_eager,
        "seed": seed,
    }


def choices(flag: str, given: list[str], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Check the words of a flag against `allowed`; each word counts once, in the order of `allowed`."""
    for word in given:
        if word not in allowed:
            raise UsageError(
                flag,
                expected=" or ".join(allowed),
                found=repr(word),
                fix=f"Try {flag} {allowed[0]}.",
            )
    return tuple(word for word in allowed if word in given)


def integers(flag: str, given: str) -> tuple[int, ...]:
    """Read numbers from 1 on, separated by commas; each counts once, in the order given.

    Raises:
        UsageError: the text is anything else.
    """
    try:
        numbers = tuple(dict.fromkeys(int(word) for word in given.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UsageError(flag, expected="whole numbers from 1 on, as 1,4,16", found=repr(given), fix=f"Try {flag} 1.")
    return numbers


def number(flag: str, word: str) -> float:
    """Read a number.

    Raises:
        UsageError: the text is anything else.
    """
    try:
        return float(word)
    except ValueError:
        raise UsageError(flag, expected="a number", found=repr(word), fix=f"See --help for {flag}.") from None


def numbers(flag: str, given: str) -> tuple[float, ...]:
    """Read numbers separated by commas, in the order given."""
    return tuple(number(flag, word) for word in given.split(","))


def bounds(flag: str, given: Sequence[str]) -> dict[str, float]:
    """Read bounds such as ttft=0.2, by name."""
    return {name: number(flag, value) for name, _, value in (word.partition("=") for word in given)}


def check_outputs(*paths: Path | None, force: bool) -> None:
    """Refuse outputs that exist, before anything is measured, and make SIGTERM an orderly end.

    Raises:
        OutputExists: an output exists and `force` is False.
        MissingExtra: a page is wanted and plotly is not installed.
    """
    from pat_serve.files.atomic import check_vacant

    for path in paths:
        if path is not None:
            check_vacant(path, force=force, folder=False)
            if path.suffix == ".html":
                require("plotly", "bench", wanted_by=f"--html {path}")
    # SIGTERM raises an exception, so that engines are ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def progress_line() -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar on stderr; yields a function of (stage, done, total)."""
    from pat_serve.terminal.progress import progress_bar

    with progress_bar() as bar:
        task = bar.add_task("checking the model", total=None)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)


def write_report(
    result: BaseModel, *, out: Path | None, html: Path | None, as_json: bool, show: Callable[[], None]
) -> None:
    """Write a result to every place that the flags name.

    Args:
        result: the record.
        out: JSON or CSV file, by its name; None writes none.
        html: page with charts; None writes none.
        as_json: JSON on stdout in place of `show`.
        show: prints what a person reads.
    """
    from pat_serve.files.atomic import write_text

    text = result.model_dump_json(indent=2) + "\n"
    if out is not None:
        if out.suffix == ".csv":
            from pat_serve.server.bench.report.rows import csv_text

            write_text(out, csv_text([result]))
        else:
            write_text(out, text)
    if html is not None:
        from pat_serve.server.bench.report.html_page import render

        write_text(html, render([(html.stem, result)]))
    if as_json:
        sys.stdout.write(text)
    else:
        show()

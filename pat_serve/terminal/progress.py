"""Progress bars on stderr for anything that takes longer than two seconds; silent when stderr is no terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column

T = TypeVar("T")

# When several processes train one model, the first speaks for all.
console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Make a rich progress display with counts, elapsed and remaining time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        # A long description would take room from the other columns.
        TimeRemainingColumn(table_column=Column(min_width=7, no_wrap=True)),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar."""
    with progress_bar() as progress:
        yield from progress.track(items, total=total, description=description)


@contextmanager
def byte_progress(description: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show progress with bytes, bytes per second and time left; yields a function of the number of bytes done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(table_column=Column(min_width=7, no_wrap=True)),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total_bytes)
        yield lambda done: progress.advance(task, done)


def say(message: str) -> None:
    """Tell a person one line of news on stderr, so that `--json` on stdout stays clean."""
    console.print(message, highlight=False, soft_wrap=True, markup=False)

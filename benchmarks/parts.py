"""Which share of the runs a process does, where several go side by side."""

from __future__ import annotations

import typer


def parse(text: str | None) -> tuple[int, int]:
    """Number and count of a `--part`.

    Raises:
        typer.BadParameter: it is not of the form 2/8.
    """
    try:
        number, parts = map(int, (text or "1/1").split("/"))
    except ValueError:
        number, parts = 0, 0
    if not 1 <= number <= parts:
        raise typer.BadParameter(f"--part {text}: such as 2/8")
    return number, parts

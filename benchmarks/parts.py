"""Divide the runs among processes that go side by side."""

from __future__ import annotations

import typer


def parse(text: str | None) -> tuple[int, int]:
    """Read number and count of a `--part`.

    Raises:
        typer.BadParameter: the text is not of the form 2/8.
    """
    try:
        number, parts = map(int, (text or "1/1").split("/"))
    except ValueError:
        number, parts = 0, 0
    if not 1 <= number <= parts:
        raise typer.BadParameter(f"--part {text}: such as 2/8")
    return number, parts

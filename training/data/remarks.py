"""Remarks on a source of rows, each made once, however many rows it is about."""

from __future__ import annotations

from pat_serve.terminal.progress import say


class Remarks:
    """Says every remark once.

    Args:
        subject: what the remarks are about, as they name it.
    """

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._made: set[str] = set()
        self._named: set[str] = set()

    def once(self, remark: str) -> None:
        """Say it, unless it has been said."""
        if remark not in self._made:
            self._made.add(remark)
            say(f"{self._subject}: {remark}")

    def name_once(self, names: list[str], remark: str) -> None:
        """Say a remark about those of several names that have not been named."""
        new = [name for name in names if name not in self._named]
        if new:
            self._named.update(new)
            say(f"{self._subject}: {remark}: {', '.join(new)}")

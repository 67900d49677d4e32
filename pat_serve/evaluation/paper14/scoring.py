"""Judge a generated answer by the paper's rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def first_letter(text: str, letters: str) -> str | None:
    """Find the first capital letter of a text that is one of the labels; None without one."""
    return next((letter for letter in text if letter in letters), None)


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer for lm-eval: 1 for the right letter. An answer without a letter is wrong."""
    return {"acc": float(first_letter(results[0], doc["letters"]) == doc["letter"])}

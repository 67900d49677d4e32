"""A generated answer, judged by the paper's rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def first_letter(text: str, letters: str) -> str | None:
    """The first capital letter of a text that is one of the labels; None when there is none."""
    return next((letter for letter in text if letter in letters), None)


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's hook: 1 for the right letter. No letter is a wrong answer."""
    return {"acc": float(first_letter(results[0], doc["letters"]) == doc["letter"])}

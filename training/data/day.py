"""The day that a chat template writes into a conversation, as Llama 3.2's does: a run's rows have the day it began."""

from __future__ import annotations

from datetime import date
from typing import Any

from pat_serve.training.data.row import Tokenizer


def writes_the_day(tokenizer: Tokenizer) -> bool:
    """Tell whether one of the tokenizer's chat templates asks for the day."""
    return "strftime_now" in str(tokenizer.chat_template)


class DatedTokenizer:
    """A tokenizer whose chat template is told a day of ours in the place of today.

    Args:
        tokenizer: tokenizer of the base.
        day: day that the template is told.
    """

    def __init__(self, tokenizer: Any, day: date) -> None:
        self._tokenizer = tokenizer
        self.template_clock = {"strftime_now": day.strftime}

    def __getattr__(self, name: str) -> Any:
        if name in ("_tokenizer", "template_clock"):  # the attribute is not set yet while this object is unpickled
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

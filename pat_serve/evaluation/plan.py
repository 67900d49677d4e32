"""The measures that one call of pat-eval takes, and how it takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pat_serve.errors import UsageError
from pat_serve.evaluation.answers.work import AnswerPlan
from pat_serve.evaluation.backends import BackendSettings
from pat_serve.evaluation.subject import Examples


@dataclass(frozen=True, kw_only=True)
class Text:
    """Text for perplexity in windows.

    Attributes:
        name: in the report.
        read: gives the whole text.
        identity: tells this text from others, for the cache.
    """

    name: str
    read: Callable[[], str]
    identity: str


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Instruction data, for the perplexity of its responses.

    Attributes:
        name: in the report.
        encode: a tokenizer -> examples, and the number of rows that were too long.
        identity: tells these rows from others, for the cache; None where nobody knows, and then nothing is kept.
        settings: other settings that the examples depend on, for report and cache.
    """

    name: str
    encode: Callable[[Any], tuple[Examples, int]]
    identity: str | None
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All measures of a call, and how to take them.

    Attributes:
        responses: instruction data, or None.
        texts: for perplexity in windows.
        context_tokens: length of a window; None: 2,048, or the length that the models take.
        stride: see `cut_windows`.
        tasks: names of lm-eval, or of the paper's fourteen.
        task_data: local items of the fourteen.
        answers: prompts to answer, and questions that can be checked.
        num_fewshot: None leaves it to the task.
        limit: rows, windows and items of a task at most.
        backend: how the models are asked.
        load_tokenizer: from a folder.
        out: folder that keeps finished work; None keeps none.
    """

    responses: Responses | None = None
    texts: tuple[Text, ...] = ()
    context_tokens: int | None = None
    stride: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    answers: AnswerPlan = field(default_factory=AnswerPlan)
    num_fewshot: int | None = None
    limit: int | None = None
    backend: BackendSettings = field(default_factory=BackendSettings)
    load_tokenizer: Callable[[Path], Any]
    out: Path | None = None


def check_names(names: Sequence[str]) -> None:
    """Refuse two data sets of one name, because the report tells figures apart by these names.

    Raises:
        UsageError: two have the same.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            "--data, --text and --wikitext2",
            expected="files whose names differ",
            found=f"{twice} more than once",
            fix="Rename one, or measure it in a call of its own.",
        )

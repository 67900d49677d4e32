"""The data set of one of the 14 tasks, for lm-eval's `custom_dataset`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pat_serve.errors import DataError, first_line
from pat_serve.evaluation.hub_data import loading
from pat_serve.evaluation.paper14.local_items import local_questions
from pat_serve.evaluation.paper14.questions import SOURCES, Question


def load(task: str, task_data: str | None = None) -> list[Question]:
    """Load all questions of a task.

    Args:
        task: one of `SOURCES`.
        task_data: folder of local files; None for the hub.

    Raises:
        DataError: the files do not exist or have another form.
        HubError: the hub was not reached and nothing is cached.
    """
    return local_questions(Path(task_data), task) if task_data else _from_hub(task)


def dataset(name: str, task_data: str | None = None, **_: Any) -> dict[str, Any]:
    """Give lm-eval a split of rows. lm-eval also hands over its own metadata, which has no use here."""
    from datasets import Dataset

    return {"test": Dataset.from_list([question.as_row() for question in load(name, task_data)])}


def _from_hub(task: str) -> list[Question]:
    from datasets import load_dataset

    source = SOURCES[task]
    subject = f"{source.path} ({source.name or 'default'}, {source.split})"
    with loading(subject, fix="Check the network, or give local files: --task-data DIR."):
        rows = load_dataset(source.path, source.name, split=source.split)
    try:
        return [question for row in rows if (question := source.question(row)) is not None]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(
            subject,
            expected="the fields that this data set had",
            found=f"{type(error).__name__}: {first_line(error)}",
            fix="The data set has changed; give local files: --task-data DIR.",
        ) from error

"""Items from local files of written-out prompts: `TASK.json`, a mapping of number to `origin_prompt` and `gold`.

The evaluation of the paper's authors writes its predictions in this form. The parser takes off the letters before the
options, so that the same items serve the likelihood tasks too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pat_serve.errors import DataError, first_line
from pat_serve.evaluation.paper14.questions import LETTERS, Question
from pat_serve.files.strict_json import parse

# Such a folder has these names for our tasks. MMLU has one file a subject.
FILES = {
    "arc_challenge": "ARC-c.json",
    "arc_easy": "ARC-e.json",
    "boolq": "BoolQ.json",
    "copa": "COPA.json",
    "hellaswag": "hellaswag.json",
    "mmlu": "lukaemon_mmlu_*.json",
    "multirc": "MultiRC.json",
    "openbookqa": "openbookqa_fact.json",
    "piqa": "piqa.json",
    "rte": "RTE.json",
    "siqa": "siqa.json",
    "wic": "WiC.json",
    "winogrande": "winogrande.json",
    "wsc": "WSC.json",
}
_ANSWER = re.compile(r"\n(Answer: ?)$")


def local_files(folder: Path, task: str) -> list[Path]:
    """The files of a task; none when the folder does not have it."""
    return sorted(folder.glob(FILES[task]))


def local_questions(folder: Path, task: str) -> list[Question]:
    """Read all items of a task, in the files' order.

    Raises:
        DataError: a file does not exist or has another form.
    """
    paths = local_files(folder, task)
    if not paths:
        raise DataError(
            folder, expected=f"{FILES[task]} in it", found="no such file", fix=f"Leave {task} out, or add the file."
        )
    return [question for path in paths for question in _questions(path)]


def parse_prompt(prompt: str, gold: str) -> Question:
    """Turn a written-out prompt into a question.

    Args:
        prompt: a stem, lines of options that begin with `A. `, `B. ` and so on, and a last line `Answer:`.
        gold: the right letter.

    Raises:
        ValueError: the prompt has another form.
    """
    end = _ANSWER.search(prompt)
    if end is None:
        raise ValueError("no last line `Answer:`")
    body = prompt[: end.start()]
    # Options may hold line feeds, and stems may hold a line that begins with a letter: the last `A. ` counts.
    stem, found, rest = body.rpartition("\nA. ")
    if not found:
        raise ValueError("no line that begins with `A. `")
    options = []
    for letter in LETTERS[1:]:
        option, found, after = rest.partition(f"\n{letter}. ")
        options.append(option)
        if not found:
            break
        rest = after
    if len(gold) != 1 or gold not in LETTERS[: len(options)]:
        raise ValueError(f"the gold {gold!r:.20} among {len(options)} options")
    return Question(stem=stem, options=tuple(options), gold=LETTERS.index(gold), answer=end[1])


def _questions(path: Path) -> list[Question]:
    try:
        items: Any = parse(path.read_bytes())
        if not isinstance(items, dict):
            raise ValueError(f"a {type(items).__name__}")
        return [_question(number, item) for number, item in items.items()]
    except (OSError, ValueError) as error:
        raise DataError(
            path,
            expected="a JSON object of items with an origin_prompt and a gold letter",
            found=first_line(error),
            fix="Give the folder of such files, or leave --task-data out to use the hub.",
        ) from error


def _question(number: str, item: Any) -> Question:
    if not (isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("origin_prompt", "gold"))):
        raise ValueError(f"item {number} without an origin_prompt or a gold")
    try:
        return parse_prompt(item["origin_prompt"], item["gold"])
    except ValueError as error:
        raise ValueError(f"item {number}: {error}") from error

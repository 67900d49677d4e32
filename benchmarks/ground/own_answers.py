"""Instruction rows: a chat model's own answers to prompts made of the ground's texts. They keep a chat model one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.ground.build import WEIGHTS, Ground
from benchmarks.ground.mixture import mix
from benchmarks.ground.passages import Passage, draw, row_of
from pat_serve.demo.real.chat_prompts import chat_prompts
from pat_serve.demo.real.self_answers import answers_of, open_model
from pat_serve.evaluation.cache import checkpoint_sha256
from pat_serve.files.atomic import write_text
from pat_serve.terminal.progress import say

# A part of the answers is kept as soon as it is written: this many prompts.
_PART_PROMPTS = 128
# So many prompts stay without an answer: repetition and agreement are measured on them.
_HELD_OUT_SHARE = 0.1
_QUOTED_CHARACTERS = 700
_MOST_HELD_OUT = 200
_TEXT = (
    "Summarize this text in two sentences:\n\n{text}",
    "What is the main idea of this text?\n\n{text}",
    "Write one question that this text answers, and answer it.\n\n{text}",
    "Explain this to a child:\n\n{text}",
    "Continue this text:\n\n{text}",
)
_WORD = (
    "What does the word '{text}' mean?",
    "Use the word '{text}' in a sentence.",
    "Explain '{text}' in one sentence.",
    "Write a short paragraph about {text}.",
)
_SAYING = ("Explain this saying: {text}", "Rewrite this in plain English: {text}")
_CODE = ("What does this do?\n\n{text}", "Write a short usage example for this:\n\n{text}")
_TEMPLATES = {"articles": _TEXT, "books": _TEXT, "foldoc": _TEXT, "wordnet": _WORD, "gcide": _WORD,
              "fortunes": _SAYING, "python": _CODE, "items": ("{text}",)}  # fmt: skip


def prompts_of(ground: Ground) -> tuple[list[str], list[str]]:
    """Prompts to answer and prompts held out, in an order whose beginnings have every kind.

    The demo's prompts are among the former alone.
    """
    made = dict.fromkeys(prompt for passage in ground.trained for prompt in _prompts(passage))
    own = [prompt for prompt in made if draw("prompts", prompt) >= _HELD_OUT_SHARE]
    held = [prompt for prompt in made if draw("prompts", prompt) < _HELD_OUT_SHARE]
    chat = chat_prompts()
    # Every third prompt is a plain request, which the texts give none of.
    mixed = [prompt for at, pair in enumerate(zip(own[::2], own[1::2], strict=False))
             for prompt in (*pair, *chat[at : at + 1])]  # fmt: skip
    return mixed, held[:_MOST_HELD_OUT]


def write_prompts(ground: Ground, out: Path) -> None:
    """Write the prompts that no model answers here."""
    write_text(out / "prompts.jsonl", _jsonl({"prompt": prompt} for prompt in prompts_of(ground)[1]))


def write_own_answers(ground: Ground, model: Path, count: int, out: Path) -> dict[str, Any]:
    """Have a model answer prompts, and write the rows; answers of an earlier call are used again.

    Args:
        ground: whose texts the prompts are made of.
        model: folder of a chat model.
        count: prompts at most.
        out: folder of the ground.

    Returns:
        what the record tells of them.
    """
    prompts, held = prompts_of(ground)
    model_sha256 = checkpoint_sha256(model)
    rows = _answered(model, prompts[:count], out / "answers" / model_sha256[:16])
    write_text(out / "instructions.jsonl", _jsonl(rows))
    said = {row["messages"][-1]["content"]: row for row in rows}
    answers = [Passage(source="answers", document="", text=text) for text in said]
    mixed = mix([*ground.trained, *answers], WEIGHTS, "ground")
    write_text(
        out / "mixed.jsonl",
        _jsonl(said[each.text] if each.source == "answers" else row_of(each.text) for each in mixed),
    )
    return {
        "model": model.name,
        "model_sha256": model_sha256,
        "prompts": min(count, len(prompts)),
        "answers": len(rows),
        "characters": sum(map(len, said)),
        "held_out": len(held),
    }


def _answered(model: Path, prompts: list[str], folder: Path) -> list[dict[str, Any]]:
    """Rows of the prompts that got an answer; each part lies in a file that its prompts name."""
    rows: list[dict[str, Any]] = []
    llm = None
    for at in range(0, len(prompts), _PART_PROMPTS):
        part = prompts[at : at + _PART_PROMPTS]
        path = folder / f"{hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16]}.jsonl"
        if not path.is_file():
            say(f"answers {at + 1} to {at + len(part)} of {len(prompts)}")
            llm = llm or open_model(model)
            write_text(path, _jsonl(answers_of(llm, part)))
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return rows


def _prompts(passage: Passage) -> Iterator[str]:
    """One prompt of a passage, or none where its source has no template or its text does not fit one."""
    templates = _TEMPLATES.get(passage.source)
    if templates is None:
        return
    text = passage.text
    if templates is _WORD:
        head = text.split("\n", 1)[0].strip()
        text = head if head.isascii() and head.replace(" ", "").isalpha() and len(head.split()) <= 2 else ""
    elif passage.source == "items":
        # The question without the answer that the row has.
        text = text.rsplit("\nAnswer:", 1)[0].removeprefix("Question: ")
    elif templates is _TEXT:
        text = text[:_QUOTED_CHARACTERS].rsplit(". ", 1)[0] + "."
    if text and len(text) <= _QUOTED_CHARACTERS:
        yield templates[int(draw("template", passage.text) * len(templates))].format(text=text)


def _jsonl(rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

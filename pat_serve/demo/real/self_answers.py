"""The text that the demo tunes on: the parent's own answers to many prompts, kept in `answers.jsonl`.

Tuning on other text makes a chat model write like that text. Tuning on its own answers keeps the model as it was, as
far as the smaller one can. The answers are kept, because writing them takes as long as the whole demo:

    python -m pat_serve.demo.real.self_answers MODEL pat_serve/demo/real/answers.jsonl
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pat_serve.demo.real.chat_prompts import chat_prompts

_FILE = files("pat_serve.demo.real") / "answers.jsonl"
MOST_NEW_TOKENS = 128
# A model is in a loop when it repeats so many words in a row so many times.
LOOP_WORDS, LOOP_TIMES = 4, 3
# A text may end with a sentence, a line or a block of code.
_END = re.compile(r"[.!?:)\"'`]\s")


def kept_answers() -> list[dict[str, Any]]:
    """Read the kept rows of two messages each, in the order of the prompts."""
    return [json.loads(line) for line in _FILE.read_text(encoding="utf-8").splitlines()]


def answer_prompts(model: Path, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Let a chat model answer prompts greedily in vLLM.

    Args:
        model: a folder.
        prompts: one message each.

    Returns:
        as `answers_of` says.
    """
    return answers_of(open_model(model), prompts)


def open_model(model: Path) -> Any:
    """Open a chat model in vLLM."""
    from pat_serve.server.engine.offline import offline_llm

    # vLLM wants 0.92 of the memory free by default, and other work may have some of it.
    return offline_llm(str(model), dtype="bfloat16", max_model_len=512, gpu_memory_utilization=0.45)


def answers_of(llm: Any, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Let an open model answer prompts greedily.

    An answer that is longer than `MOST_NEW_TOKENS` ends with its last whole sentence.

    Args:
        llm: from `open_model`.
        prompts: one message each.

    Returns:
        rows of two messages, in the order of the prompts, without prompts that got no answer or a looping one.
    """
    sampling = llm.get_default_sampling_params()
    sampling.temperature, sampling.max_tokens = 0.0, MOST_NEW_TOKENS
    rows = []
    for prompt, told in zip(prompts, llm.chat([[_turn("user", prompt)] for prompt in prompts], sampling), strict=True):
        [answer] = told.outputs
        said = answer.text.strip()
        said = said if answer.finish_reason == "stop" else whole_sentences(said)
        if said and not loops(said):
            rows.append({"messages": [_turn("user", prompt), _turn("assistant", said)]})
    return rows


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def whole_sentences(text: str) -> str:
    """Drop the unfinished last sentence of a text that was cut off; empty if the text has no other."""
    ends = [found.start() + 1 for found in _END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def loops(text: str) -> bool:
    """Tell whether the text says the same words again and again."""
    words = text.split()
    runs = Counter(tuple(words[at : at + LOOP_WORDS]) for at in range(len(words) - LOOP_WORDS + 1))
    return any(times >= LOOP_TIMES for times in runs.values())


def main() -> None:
    """Write `answers.jsonl` anew with the model that the command line names."""
    model, target = map(Path, sys.argv[1:])
    rows = answer_prompts(model, chat_prompts())
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()

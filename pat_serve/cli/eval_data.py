"""The data that pat-eval's flags name. The code that trains on instruction rows reads them here too."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pat_serve.demo.real.chat_prompts import chat_prompts
from pat_serve.evaluation.identity import rows_identity
from pat_serve.evaluation.plan import Responses, Text
from pat_serve.evaluation.text import text_from_file, wikitext2_from_file, wikitext2_from_hub
from pat_serve.tokens.prompts import Prompts, asked, prompts_from_file
from pat_serve.training.data import encode_rows, load_rows
from pat_serve.training.data.remarks import Remarks

BUILTIN_PROMPTS = "builtin"


def responses_of(data: str, split: str, limit: int | None, max_length_tokens: int) -> Responses:
    """Read instruction data from a file or the hub."""
    remarks = Remarks(data)

    def encode(tokenizer: Any) -> tuple[list[dict[str, list[int]]], int]:
        return encode_rows(load_rows(data, split, tokenizer, remarks=remarks)[:limit], tokenizer, max_length_tokens)

    path = Path(data)
    return Responses(
        name=path.name if path.exists() else data,
        encode=encode,
        identity=rows_identity(data, split),
        settings={"max_length_tokens": max_length_tokens},
    )


def text_of(path: Path) -> Text:
    """Read a text file for the perplexity in windows."""
    return _text(path.name, partial(text_from_file, path))


def wikitext2_of(source: str) -> Text:
    """Read WikiText-2 from a file, or from the hub where the source is `hub`."""
    return _text("wikitext2", wikitext2_from_hub if source == "hub" else partial(wikitext2_from_file, Path(source)))


def prompts_of(source: str) -> Prompts:
    """Read prompts from a file, or take the demo's where the source is `builtin`."""
    if source == BUILTIN_PROMPTS:
        return Prompts(name=source, chats=asked(chat_prompts()))
    return prompts_from_file(Path(source))


def _text(name: str, read: Callable[[], str]) -> Text:
    # The text is read at once, so a wrong path is told before a model is loaded, and the cache's key fits the text.
    content = read()
    return Text(name=name, read=lambda: content, identity=hashlib.sha256(content.encode()).hexdigest())

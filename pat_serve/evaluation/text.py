"""Text for perplexity. It is read, joined and cut as in the literature, so that figures can be compared.

The WikiText-2 protocol (GPTQ, SparseGPT, SliceGPT): the rows of the raw test split, each with its line feed and blank
ones empty, are joined by two line feeds; the whole is tokenized at once, with the tokenizer's own special tokens; the
ids are cut into windows of a fixed length that do not overlap; what is left at the end is dropped. Every window is
scored from its second token on, and the perplexity is exp of the mean over all scored tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pat_serve.errors import DataError, first_line
from pat_serve.evaluation.hub_data import loading
from pat_serve.files.text_files import read_utf8
from pat_serve.perplexity import IGNORED_LABEL

DEFAULT_CONTEXT_TOKENS = 2048
WIKITEXT2_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
_JOIN = "\n\n"


def wikitext2_from_file(path: Path) -> str:
    """Read a WikiText file (wiki.test.raw, or the variant with `<unk>`) as the one text of the protocol."""
    lines = _read(path).split("\n")
    rows = [f"{line}\n" if line.strip() else "" for line in lines[:-1]] + ([lines[-1]] if lines[-1].strip() else [])
    return _JOIN.join(rows)


def wikitext2_from_hub() -> str:
    """Read the raw test split of WikiText-2 from the hub or its cache.

    Raises:
        HubError: neither hub nor cache has it.
    """
    from datasets import load_dataset

    source, name, split = WIKITEXT2_HUB
    with loading(f"{source} ({name})", fix="Check the network, or give a file: --wikitext2 PATH."):
        rows = load_dataset(source, name, split=split)["text"]
    return _JOIN.join(rows)


def text_from_file(path: Path) -> str:
    """Read any text file as it is, or the `text` fields of a JSONL file, joined by two line feeds.

    Raises:
        DataError: the file does not exist or is not UTF-8, or a row has no text.
    """
    content = _read(path)
    if path.suffix.lower() != ".jsonl":
        return content
    texts = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            # Files are joined with their byte-order marks, too.
            row = json.loads(line.removeprefix("\ufeff"))
            text = row["text"]
        except (ValueError, KeyError, TypeError) as error:
            text = error
        if not isinstance(text, str):
            raise DataError(
                f"{path}, line {number}",
                expected='an object with a "text"',
                found=f"{line:.60}",
                fix="For instructions use --data.",
            )
        texts.append(text)
    return _JOIN.join(texts)


def cut_windows(ids: Sequence[int], context_tokens: int, stride: int | None = None) -> list[dict[str, list[int]]]:
    """Cut a text into windows, with labels for the tokens to score.

    Args:
        ids: token ids of the whole text.
        context_tokens: length of a window.
        stride: None: windows that do not overlap, the rest dropped (the protocol). Else every window begins so many
            tokens after the one before, and only what no earlier window scored counts; the last one ends with the text.

    Returns:
        `input_ids` and `labels` each; -100 marks a token that is context alone.

    Raises:
        ValueError: a stride outside [1, context_tokens].
    """
    if stride is None:
        starts = range(0, len(ids) - context_tokens + 1, context_tokens)
        return [_window(ids, start, start + context_tokens, start) for start in starts]
    if not 1 <= stride <= context_tokens:
        raise ValueError(f"a stride must be in [1, {context_tokens}], not {stride}")
    windows, scored = [], 0
    for start in range(0, len(ids), stride):
        end = min(start + context_tokens, len(ids))
        if end - max(scored, start + 1) > 0:
            windows.append(_window(ids, start, end, scored))
        scored = end
        if end == len(ids):
            break
    return windows


def _window(ids: Sequence[int], start: int, end: int, scored_from: int) -> dict[str, list[int]]:
    window = list(ids[start:end])
    # Nothing predicts a window's first token, whatever its label says.
    first = max(scored_from - start, 1)
    return {"input_ids": window, "labels": [IGNORED_LABEL] * first + window[first:]}


def _read(path: Path) -> str:
    try:
        return read_utf8(path)
    except (OSError, ValueError) as error:
        raise DataError(
            path,
            expected="a text file in UTF-8",
            found=first_line(error),
            fix="Check the path and the encoding (iconv -t UTF-8 converts).",
        ) from error

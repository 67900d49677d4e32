"""The tokens at which a served export stops: the base's, and those that the training's answers end with.

A base that is no chat model often has a chat template, and a generation config that names the end of a text alone.
After training on chats such a model ends its answers as the template does, and a server would not stop there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pat_serve.errors import BrokenPlan, first_line
from pat_serve.export.run.reader import Run
from pat_serve.files.atomic import write_json
from pat_serve.run.folder import END_TOKENS_FILE
from pat_serve.terminal.progress import say

_GENERATION_CONFIG = "generation_config.json"


def add_end_tokens(run: Run, folder: Path) -> None:
    """Add the training's end tokens to an export's generation config, which vLLM and transformers stop by.

    Args:
        run: the run; a run of an earlier version names no end tokens.
        folder: the export, with the files from the base.

    Raises:
        BrokenPlan: the run's record is damaged.
    """
    path = folder / _GENERATION_CONFIG
    known: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else _from_config(run.base.config)
    ends = _listed(known.get("eos_token_id"))
    new = [token_id for token_id in _trained_ends(run) if token_id not in ends]
    if new:
        write_json(path, known | {"eos_token_id": [*ends, *new]})
        say(f"{_GENERATION_CONFIG}: the trained answers end with {new}, which the base's does not stop at: added")


def _trained_ends(run: Run) -> list[int]:
    path = run.folder / END_TOKENS_FILE
    if not path.is_file():
        return []
    try:
        token_ids = json.loads(path.read_bytes())["token_ids"]
    except (ValueError, KeyError, TypeError) as error:
        raise _broken(path, first_line(error)) from error
    vocab = run.base.sizes.vocab
    if not isinstance(token_ids, list) or not all(type(one) is int and 0 <= one < vocab for one in token_ids):
        raise _broken(path, f"{token_ids!r:.60}")
    return token_ids


def _from_config(config: dict[str, Any]) -> dict[str, Any]:
    """Make the generation config that transformers and vLLM assume where there is none."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _broken(path: Path, found: str) -> BrokenPlan:
    return BrokenPlan(path, expected="token_ids of the base", found=found, fix="Copy the run again.")

"""Finished measurements, kept by what they depend on: a second call goes on where the first one ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pat_serve.checkpoints.locate import HUB_PATTERNS
from pat_serve.evaluation.outcomes import OUTCOME, Outcome
from pat_serve.files.atomic import write_json
from pat_serve.run.plan import file_sha256

CACHE_FOLDER = "outcomes"
# The version rises when the same settings would give other figures.
_MEASUREMENT_VERSION = 2


class Cache:
    """A folder with one file for each outcome.

    Args:
        folder: where they lie; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get_or(self, key: dict[str, Any] | None, measure: Callable[[], Outcome]) -> Outcome:
        """Return the outcome under a key; measure and keep it if there is none.

        Args:
            key: everything that the outcome depends on; None for an outcome that must not be kept.
            measure: measures the outcome.
        """
        found = self.get(key)
        if found is None:
            found = measure()
            if self._folder is not None and key is not None:
                write_json(self._path(key), {"key": self._full(key), "outcome": found.model_dump()})
        return found

    def get(self, key: dict[str, Any] | None) -> Outcome | None:
        """Return the outcome under a key, or None; a damaged file counts as none."""
        if self._folder is None or key is None:
            return None
        try:
            content = json.loads(self._path(key).read_text(encoding="utf-8"))
            return OUTCOME.validate_python(content["outcome"]) if content["key"] == self._full(key) else None
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None

    def _full(self, key: dict[str, Any]) -> Any:
        # The outcome passes through JSON, so that it compares equal when it is read back.
        return json.loads(json.dumps({"measurement": _MEASUREMENT_VERSION, **key}, sort_keys=True))

    def _path(self, key: dict[str, Any]) -> Path:
        assert self._folder is not None
        digest = hashlib.sha256(json.dumps(self._full(key), sort_keys=True).encode()).hexdigest()
        return self._folder / CACHE_FOLDER / f"{digest[:32]}.json"


def checkpoint_sha256(folder: Path) -> str:
    """SHA-256 of everything in a checkpoint that decides what it answers: config, weights, tokenizer."""
    files = sorted({path for pattern in HUB_PATTERNS for path in folder.glob(pattern) if path.is_file()})
    digest = hashlib.sha256()
    for path in files:
        # This file is provenance: date and versions of the export.
        if path.name != "pat_export.json":
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()

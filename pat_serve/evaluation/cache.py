"""Finished measurements, kept by what they depend on: a second call goes on where the first one ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pat_serve.checkpoints.locate import HUB_PATTERNS
from pat_serve.evaluation.outcomes import OUTCOME, Answers, Likelihoods
from pat_serve.files.atomic import write_json
from pat_serve.plan import file_sha256

CACHE_FOLDER = "outcomes"
# Rises when the same settings would come to other figures.
_MEASUREMENT_VERSION = 2


class Cache:
    """One file an outcome.

    Args:
        folder: where they lie; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get_or(self, key: dict[str, Any] | None, measure: Callable[[], Likelihoods | Answers]) -> Likelihoods | Answers:
        """What is kept under a key, or what `measure` finds, kept from then on.

        Args:
            key: everything that the outcome depends on; None for what must not be kept.
            measure: measures it.
        """
        found = self.get(key)
        if found is None:
            found = measure()
            if self._folder is not None and key is not None:
                write_json(self._path(key), {"key": self._full(key), "outcome": found.model_dump()})
        return found

    def get(self, key: dict[str, Any] | None) -> Likelihoods | Answers | None:
        """What is kept under a key; a damaged file is as good as none."""
        if self._folder is None or key is None:
            return None
        try:
            content = json.loads(self._path(key).read_text(encoding="utf-8"))
            return OUTCOME.validate_python(content["outcome"]) if content["key"] == self._full(key) else None
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None

    def _full(self, key: dict[str, Any]) -> Any:
        # By way of JSON, so that what is read back compares equal.
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
        # Provenance: when it was exported, by which versions.
        if path.name != "pat_export.json":
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()

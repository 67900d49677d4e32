"""Find a model, in a folder or on the hub, and read its config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pat_serve.errors import BrokenCheckpoint, MissingModel, first_line

# What a model needs to be trained, exported and served: no pickles, no code, no other frameworks' weights.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# "owner/name" or "name"; anything else can only have been meant as a path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def locate(source: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model: a local one, or a snapshot of a hub repository.

    Args:
        source: a folder or a hub id; a folder wins.
        revision: of the hub repository.
        weights: fetch everything from the hub; else its config.json alone.

    Raises:
        MissingModel: neither exists, or the hub cannot be reached and the model is not in its cache.
    """
    path = Path(source)
    # Path("") is the current folder, which an empty variable in a script does not mean.
    if source and path.is_dir():
        if not (path / "config.json").is_file():
            raise MissingModel(
                source,
                expected="a model folder with a config.json",
                found="a folder without one",
                fix="Give the folder that holds config.json; a training run's must be exported first (pat-export).",
            )
        return path
    if path.is_file() or not _HUB_ID.fullmatch(source):
        raise MissingModel(
            source or "(empty)",
            expected="a model folder or a hub id (owner/name)",
            found="a file" if path.is_file() else "no such folder",
            fix="Check the path.",
        )
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if not weights:
            return Path(hf_hub_download(source, "config.json", revision=revision)).parent
        return Path(snapshot_download(source, revision=revision, allow_patterns=HUB_PATTERNS))
    # The hub client raises a dozen unrelated types (HTTP, cache, validation); all mean the same to the user.
    except Exception as error:
        raise MissingModel(
            source,
            expected="a model folder, or a hub id that can be downloaded or is cached",
            found=f"no such folder, and the hub said {type(error).__name__}: {first_line(error)}",
            fix="Check the name, the network and HF_TOKEN, or give a local folder.",
        ) from error


def commit_of(folder: Path) -> str | None:
    """The commit of a hub snapshot, which its folder in the hub's cache is named after; None for any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if is_snapshot else None


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        BrokenCheckpoint: it is not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(
            path, expected="a JSON object", found=str(error), fix="Copy or download the model again."
        ) from error
    if not isinstance(config, dict):
        raise BrokenCheckpoint(
            path, expected="a JSON object", found=type(config).__name__, fix="Copy or download the model again."
        )
    return config

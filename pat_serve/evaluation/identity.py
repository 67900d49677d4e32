"""Identities of data sources, so that a kept figure belongs to the data on which it was measured."""

from __future__ import annotations

import hashlib
from collections.abc import Set
from functools import cache
from pathlib import Path

from pat_serve.run.plan import file_sha256

# The time limit of a request whose answer has a few hundred bytes.
_HUB_TIMEOUT_S = 10.0


def rows_identity(source: str, split: str) -> str | None:
    """Identify the rows to measure on.

    Args:
        source: a file, a folder laid out like a hub dataset, or a hub id.
        split: split of a folder or a hub dataset.

    Returns:
        a file's SHA-256, the SHA-256 of all files of a folder, or a hub id's commit; None where nobody knows.
    """
    path = Path(source)
    if path.is_file():
        return file_sha256(path)
    if path.is_dir():
        return f"{_folder_sha256(path)} ({split})"
    commit = dataset_commit(source)
    return None if commit is None else f"{source}@{commit} ({split})"


def dataset_commits(repo_ids: Set[str] | None) -> dict[str, str] | None:
    """`dataset_commit` of several data sets; None where a commit or the data sets themselves are not known."""
    commits = {repo_id: dataset_commit(repo_id) for repo_id in sorted(repo_ids or ())}
    known = {repo_id: commit for repo_id, commit in commits.items() if commit is not None}
    return known if known and len(known) == len(commits) else None


@cache
def dataset_commit(repo_id: str) -> str | None:
    """The present commit of a hub dataset; without the hub, the commit that the cache holds.

    The answer is the same throughout one call of a command, which measures everything on the data that it loaded first.

    Args:
        repo_id: owner/name.

    Returns:
        None where neither hub nor cache knows it.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repo_id, timeout=_HUB_TIMEOUT_S).sha
    # Offline mode, network, HTTP and malformed names raise unrelated types. The cache can still tell the commit.
    except Exception:
        return _cached_commit(repo_id)


def _cached_commit(repo_id: str) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="dataset")
    branch = folder / "refs" / "main"
    if branch.is_file():
        return branch.read_text(encoding="utf-8").strip()
    # `datasets` asks for files by commit, which moves no branch in the cache.
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime_ns).name if snapshots else None


def _folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()

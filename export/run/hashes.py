"""SHA-256 of the files that decide what an export computes, for `pat-export verify`."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pat_serve.run.plan import file_sha256

# hashlib leaves Python's lock while it works; more threads than this wait for the disk.
_THREADS = 2


def hash_files(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Hash config.json, the weights and their index: SHA-256 by file name.

    Args:
        folder: folder of a checkpoint.
        known: hashes of files that were hashed while they were written.
    """
    known = known or {}
    paths = [folder / "config.json", *sorted(folder.glob("*.safetensors*"))]
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(lambda path: known.get(path.name) or file_sha256(path), paths)
        return dict(zip((path.name for path in paths), hashes, strict=True))

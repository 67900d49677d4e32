"""SHA-256 of the files that decide what an export computes, for `pat-export verify`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pat_serve.plan import file_sha256

# hashlib leaves Python's lock while it works; more threads than this wait for the disk.
_THREADS = 2


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 by file name: config.json, the weights and their index."""
    paths = [folder / "config.json", *sorted(folder.glob("*.safetensors*"))]
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip((path.name for path in paths), pool.map(file_sha256, paths), strict=True))

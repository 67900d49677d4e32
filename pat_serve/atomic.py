"""Files and folders that are complete or absent: written beside their target, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pat_serve.errors import OutputExists


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_vacant(path: Path, *, force: bool, flag: str = "--out") -> None:
    """Refuse an output path that holds something, unless the user forces it.

    Raises:
        OutputExists: the path exists and `force` is False.
    """
    if path.exists() and not force:
        raise OutputExists(
            f"{flag} {path}",
            expected="a path that does not exist yet",
            found="a file" if path.is_file() else "a folder",
            fix="Choose another path, or replace it with --force.",
        )


@contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder that appears under its name only when the block ends without an error.

    Args:
        target: where the folder shall be.
        force: replace what stands there. The old folder stays until the new one is complete.

    Yields:
        a staging folder on the same file system.

    Raises:
        OutputExists: target exists and `force` is False.
    """
    check_vacant(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
    try:
        yield staging
        staging.chmod(0o755)
        if target.exists():
            # Two renames instead of a delete: a crash between them leaves the old content beside the new.
            retired = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old-"))
            os.replace(target, retired / target.name)
            os.replace(staging, target)
            shutil.rmtree(retired)
        else:
            os.replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise

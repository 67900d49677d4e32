"""Files and folders that are complete or absent: written beside their target, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pat_serve.errors import OutputExists

# What marks a folder as one that we wrote: a run, an export.
OUTPUT_MARKS = ("recipe.yaml", "pat_export.json")


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
        rename_durably(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_vacant(
    path: Path, *, force: bool, flag: str = "--out", folder: bool = True, inputs: Iterable[Path] = ()
) -> None:
    """Refuse an output path that holds something, unless the user forces it and it is ours to replace.

    Args:
        path: where output shall go.
        force: replace an earlier output.
        flag: what the user wrote, for the message.
        folder: the output is a folder; else a file.
        inputs: files and folders that are read; they are never replaced, forced or not.

    Raises:
        OutputExists: the path exists and `force` is False, or it is or holds an input, or it is no earlier output.
    """
    if not path.exists():
        return
    resolved = path.resolve()
    for source in inputs:
        if source.exists() and source.resolve().is_relative_to(resolved):
            raise OutputExists(
                f"{flag} {path}", expected="a path without input in it", found=str(source), fix="Choose another path."
            )
    if not force:
        raise OutputExists(
            f"{flag} {path}",
            expected="a path that does not exist yet",
            found="a file" if path.is_file() else "a folder",
            fix="Choose another path, or replace an earlier output with --force.",
        )
    if not folder and path.is_file():
        return
    ours = path.is_dir() and (not any(path.iterdir()) or any((path / name).is_file() for name in OUTPUT_MARKS))
    if not folder or not ours:
        raise OutputExists(
            f"{flag} {path}",
            expected=f"an earlier output of ours, with {' or '.join(OUTPUT_MARKS)} in it" if folder else "a file",
            found="a folder with something else" if path.is_dir() else "a file",
            fix="Choose another path; --force replaces nothing that pat-serve did not write.",
        )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block ends without an error.

    What stands at the target stays until the new folder is complete, and then gives way (see `check_vacant`).

    Yields:
        a staging folder on the same file system.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
    try:
        yield staging
        staging.chmod(0o755)
        sync_tree(staging)
        if target.exists():
            # Two renames instead of a delete: a crash between them leaves the old content beside the new.
            retired = retire(target)
            try:
                rename_durably(staging, target)
            except BaseException:
                os.replace(retired, target)
                raise
            shutil.rmtree(retired)
        else:
            rename_durably(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def retire(folder: Path) -> Path:
    """Move a folder aside, under a hidden name beside it; the caller deletes it or moves it back."""
    retired = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old-"))
    os.replace(folder, retired)  # onto an empty folder, which rename(2) allows
    return retired


def sync_tree(folder: Path) -> None:
    """Force a folder's files, and the folders that name them, to the disk: before the rename that makes them count."""
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def rename_durably(source: Path, target: Path) -> None:
    """Rename, and force the new name to the disk too: without it a power cut can undo the rename."""
    os.replace(source, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

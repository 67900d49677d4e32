"""Files and folders that are complete or absent: each is written beside its target, then renamed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pat_serve.errors import OutputExists

# These files mark a folder that we wrote: a run, an export.
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
    """Write indented JSON, so that a reader sees the old file or the new one."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_vacant(
    path: Path, *, force: bool, flag: str = "--out", folder: bool = True, inputs: Iterable[Path] = ()
) -> None:
    """Refuse an output path that holds something, unless the user forces it and it is ours to replace.

    Args:
        path: place of the output.
        force: replace an earlier output.
        flag: flag that the user wrote, for the message.
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
def new_folder(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Make a folder that appears under its name only when the block ends without an error.

    A folder that stands at the target when the block begins stays until the new folder is complete, and then gives way
    (see `check_vacant`). A folder that appears there meanwhile is another process's, and stays. Staging folders that
    killed processes left behind are deleted first.

    Args:
        target: the folder.
        replace: a folder at the target gives way; if False, it is another process's, newer than the caller's look.

    Yields:
        a staging folder on the same file system.

    Raises:
        OutputExists: another process has written the target meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    replaced = _identity(target)
    if replaced is not None and not replace:
        raise _taken(target)
    staging, lock = _locked_staging(target)
    try:
        yield staging
        staging.chmod(0o755)
        sync_tree(staging)
        if replaced is None:
            _rename_to_vacant(staging, target)
        elif _identity(target) != replaced:
            raise _taken(target)
        else:
            # The old content is under the staging folder's name now, which a later run sweeps up if this one is killed.
            _exchange(staging, target)
            _sync(target.parent)
            shutil.rmtree(staging, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _locked_staging(target: Path) -> tuple[Path, int]:
    """Make a folder beside the target, with a descriptor whose lock says that its process is alive."""
    while True:
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=_staging_prefix(target)))
        try:
            lock = _lock(staging)
        except (FileNotFoundError, BlockingIOError):
            continue  # between the two calls another process has taken it for abandoned
        except OSError:
            # No locks on this file system: nobody can tell that the folder is in use, so nobody sweeps it up either.
            return staging, os.open(staging, os.O_RDONLY)
        if _identity(staging) is not None:
            return staging, lock
        os.close(lock)


def _sweep(target: Path) -> None:
    """Delete the target's staging folders whose processes, and so whose locks, are gone."""
    name = re.compile(re.escape(_staging_prefix(target)) + r"[a-z0-9_]{8}")
    for path in target.parent.iterdir():
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                lock = _lock(path)
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path) -> int:
    """Lock a folder until the returned descriptor is closed or the process ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _staging_prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _identity(path: Path) -> tuple[int, int] | None:
    """Identify a folder whatever its name; None where there is nothing."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _rename_to_vacant(staging: Path, target: Path) -> None:
    try:
        # rename(2) fails onto a folder with something in it.
        rename_durably(staging, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise _taken(target) from error


def _exchange(first: Path, second: Path) -> None:
    """Swap two names in one step, so that at every moment something complete stands under both.

    Where the file system cannot swap, it takes three steps: a process that is killed in between leaves the old content
    under a hidden name.
    """
    rename_exchange = 2
    library = ctypes.CDLL(None, use_errno=True)
    arguments = (-100, os.fsencode(first.absolute()), -100, os.fsencode(second.absolute()), rename_exchange)
    if hasattr(library, "renameat2") and library.renameat2(*arguments) == 0:
        return
    retired = retire(second)
    try:
        os.replace(first, second)
    except BaseException:
        os.replace(retired, second)
        raise
    os.replace(retired, first)


def _taken(target: Path) -> OutputExists:
    return OutputExists(
        target,
        expected="a path that nobody else writes",
        found="what another process has written there meanwhile",
        fix="Choose another path, or look at what it has written.",
    )


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

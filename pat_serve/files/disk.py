"""Room on a disk: asked for before work begins, and a disk that fills up all the same told as what it is."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pat_serve.errors import DiskFull, PatServeError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How safetensors' Rust and torch's C++ tell the same, the latter without a reason: its writers do nothing but write.
_TOLD = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|\(os error (28|122|27)\)"
    r"|(PytorchStreamWriter failed|enforce fail at inline_container\.cc)"
)


def check_room(out: Path, needed_bytes: int, fix: str, what: str = "") -> None:
    """The disk has room for so many bytes.

    Args:
        out: what is to be written; it need not be there.
        needed_bytes: of it.
        fix: the way out.
        what: that is, for the message.

    Raises:
        DiskFull: it has not.
    """
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise DiskFull(
            place,
            expected=f"{_size(needed_bytes)} of free space" + (f" for {what}" if what else ""),
            found=_size(free_bytes),
            fix=fix,
        )


def full_disk(error: BaseException) -> str | None:
    """What a library's error says of a disk that is full, of a quota or of a bound on a file's size; else None."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return cause.strerror or "no more room"
        if not isinstance(cause, PatServeError) and (found := _TOLD.search(str(cause))):
            return "a write that failed" if found[2] else found[0]
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


@contextmanager
def room_on_disk(out: Path, fix: Callable[[], str]) -> Iterator[None]:
    """A disk that fills up under the block is an error of its own.

    Args:
        out: what is written.
        fix: gives the way out, once the disk is full.

    Raises:
        DiskFull: there was no room for a write.
    """
    try:
        yield
    except Exception as error:
        if (found := full_disk(error)) is None:
            raise
        raise DiskFull(out, expected="a disk that takes all files", found=found, fix=fix()) from error


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

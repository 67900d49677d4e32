"""Room on a disk. It is checked before work begins, and a disk that fills up later has an error of its own."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pat_serve.errors import DiskFull, PatServeError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors' Rust and torch's C++ say it so. torch names no reason, but its writers do nothing except write.
_TOLD = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|\(os error (28|122|27)\)"
    r"|(PytorchStreamWriter failed|enforce fail at inline_container\.cc)"
)


def check_room(out: Path, needed_bytes: int, fix: str, what: str = "") -> None:
    """Check that the disk has room for a number of bytes.

    Args:
        out: file or folder to be written; it need not exist.
        needed_bytes: size of the output.
        fix: the way out.
        what: name of the output, for the message.

    Raises:
        DiskFull: the disk has less room.
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
    """Read from a library's error that a disk, a quota or a file's size limit is full; None for other errors."""
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
    """Raise an error of its own when the disk fills up during the block.

    Args:
        out: file or folder that the block writes.
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

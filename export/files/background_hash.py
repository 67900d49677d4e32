"""Hash files and force them to the disk behind the threads that write them, not after them.

Bytes that are written without a gap are hashed from the page cache at once, and go to the disk in pieces. So little of
either work is left at the end, and the disk works while the cores do.
"""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self

_PIECE_BYTES = 1 << 22
# A flush costs a commit of the file system's journal. Pieces of a quarter of a gigabyte keep the disk busy.
_FLUSH_BYTES = 1 << 28


@dataclass(kw_only=True)
class _File:
    descriptor: int
    size_bytes: int
    ready_bytes: int = 0
    told_bytes: int = 0
    later: dict[int, int] = field(default_factory=dict)

    def note(self, begin: int, end: int) -> bool:
        """Note that a run of bytes is written. Bytes without a gap from the first one on are ready.

        Returns:
            whether another piece or the whole file is ready.
        """
        self.later[begin] = end
        while (reached := self.later.pop(self.ready_bytes, None)) is not None:
            self.ready_bytes = reached
        more = self.ready_bytes == self.size_bytes or self.ready_bytes >= self.told_bytes + _PIECE_BYTES
        if more:
            self.told_bytes = self.ready_bytes
        return more


class Settling:
    """Files that other threads write, in about this order. Two threads run while its context lasts.

    Args:
        files: a descriptor of each file, open to read and write, and the file's final size in bytes.
    """

    def __init__(self, files: list[tuple[int, int]]) -> None:
        self._files = [_File(descriptor=descriptor, size_bytes=size) for descriptor, size in files]
        self._changed = threading.Condition()
        self._stopped = False
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="settle")
        self._tasks: list[Future[None]] = []
        self.sha256: list[str] = []

    def note(self, number: int, begin: int, end: int) -> None:
        """Note that the bytes from begin to end of a file are written."""
        with self._changed:
            if self._files[number].note(begin, end):
                self._changed.notify_all()

    def __enter__(self) -> Self:
        self._tasks = [self._pool.submit(self._hash), self._pool.submit(self._flush)]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last byte of every file; do not wait after an error.

        Raises:
            OSError: a file could not be read back or forced to the disk.
        """
        if kind is not None:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
        self._pool.shutdown()
        if kind is None:
            for task in self._tasks:
                task.result()

    def check(self) -> None:
        """Raise the error of one of the two threads, if there was one."""
        for task in self._tasks:
            if task.done():
                task.result()

    def _hash(self) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        for file in self._files:
            digest, done = hashlib.sha256(), 0
            while done < file.size_bytes:
                ready = self._wait(file, min(done + _PIECE_BYTES, file.size_bytes))
                if ready is None:
                    return
                while done < ready:
                    count = os.preadv(file.descriptor, [buffer[: min(_PIECE_BYTES, ready - done)]], done)
                    assert count, "what was written can be read"
                    digest.update(buffer[:count])
                    done += count
            self.sha256.append(digest.hexdigest())

    def _flush(self) -> None:
        for file in self._files:
            done = 0
            while done < file.size_bytes:
                ready = self._wait(file, min(done + _FLUSH_BYTES, file.size_bytes))
                if ready is None:
                    return
                os.fsync(file.descriptor)
                done = ready

    def _wait(self, file: _File, least_bytes: int) -> int | None:
        """Wait until enough bytes are ready and return their number; None when the writers have given up."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or file.ready_bytes >= least_bytes)
            return None if self._stopped else file.ready_bytes

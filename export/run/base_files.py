"""Hash a base's weight files while the export reads them, so that one pass over the disk is enough."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from pat_serve.errors import BrokenCheckpoint, ParityError
from pat_serve.export.run.reader import OTHER_BASE, Run, other_file

_PIECE_BYTES = 1 << 22


class BaseFiles:
    """Checks in a thread of its own that the base's weights are those of the training.

    The end of its context waits for the check. No result may get its name before `require` has returned. If the block
    fails and the check finds another base, the check's error is raised: it explains the failure better.

    Args:
        run: a run that was opened without this check.
    """

    def __init__(self, run: Run) -> None:
        self._expected = {path: run.plan.base.sha256[path.name] for path in run.base.shards()}
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="base")

    def __enter__(self) -> Self:
        self._done = self._pool.submit(self._check)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if isinstance(error, BrokenCheckpoint | ParityError):
                self.require()
        finally:
            self._stopped.set()
            self._pool.shutdown()

    def require(self) -> None:
        """Wait for the end of the check.

        Raises:
            BrokenPlan: a file differs from the one that the run was trained on.
        """
        self._done.result()

    def poll(self) -> None:
        """Raise the error that the check has found so far, without waiting."""
        if self._done.done():
            self._done.result()

    def _check(self) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        for path, expected in self._expected.items():
            found = self._sha256(path, buffer)
            if self._stopped.is_set():
                return
            if found != expected:
                raise other_file(path, expected, found, OTHER_BASE)

    def _sha256(self, path: Path, buffer: memoryview) -> str:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while (count := file.readinto(buffer)) and not self._stopped.is_set():
                digest.update(buffer[:count])
        return digest.hexdigest()

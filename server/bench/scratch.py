"""The folder that a measurement works in."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pat_serve.errors import EngineError


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder that is removed afterwards, unless an engine has failed and left its log there."""
    folder, keep = Path(tempfile.mkdtemp(prefix="pat-bench-")), False
    try:
        yield folder
    except EngineError:
        keep = any(folder.rglob("*.log"))
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)

"""A vLLM plugin for the tests: the engine takes its steps at a test's pace.

vLLM finds it by the entry point beside this file and loads it in each of its processes. The other end, by which a test
holds the engine, is `tests/integration/brake.py`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

# While this file exists, the engine obeys its two numbers: steps that are free, then seconds that each step waits.
BRAKE_FILE = "PAT_SERVE_TEST_BRAKE"
# Seconds that every step waits, for a machine that is slow.
STEP_S = "PAT_SERVE_TEST_STEP_S"
_POLL_S = 0.005


class Brake:
    """Reads the file before each step.

    Args:
        file: of the orders; need not exist.
        step_s: that every step waits, whatever the file says.
    """

    def __init__(self, file: Path, step_s: float) -> None:
        self.file = file
        self.step_s = step_s
        self.free_steps = 0
        self.pace_s = 0.0
        self._seen: tuple[int, int] | None = None

    def wait(self) -> None:
        """Return when the engine may take a step."""
        begun_s = time.monotonic()
        time.sleep(self.step_s)
        while self._held():
            if self.free_steps:
                self.free_steps -= 1
                return
            if time.monotonic() >= begun_s + self.pace_s:
                return
            time.sleep(_POLL_S)

    def _held(self) -> bool:
        try:
            found = self.file.stat()
            if self._seen != (found.st_ino, found.st_mtime_ns):
                free_steps, pace_s = self.file.read_text().split()
                self.free_steps, self.pace_s = int(free_steps), float(pace_s)
                self._seen = (found.st_ino, found.st_mtime_ns)
        except FileNotFoundError:
            self._seen = None
            return False
        return True


def install() -> None:
    """Put the brake into the engine, in the process that has one."""
    core = sys.modules.get("vllm.v1.engine.core")
    if core is None or BRAKE_FILE not in os.environ:
        return
    brake = Brake(Path(os.environ[BRAKE_FILE]), float(os.environ.get(STEP_S, "0")))
    step = core.EngineCoreProc._process_engine_step

    def braked_step(self: Any) -> bool:
        brake.wait()
        done: bool = step(self)
        return done

    core.EngineCoreProc._process_engine_step = braked_step

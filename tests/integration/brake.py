"""Holding a server's engine, so that what a test looks at is still there however fast the engine is.

A request with many tokens is no request without an end: a tiny model makes thousands of them a second. A held engine
goes on with its work, takes new requests, forgets those whose client has left and reports its metrics, but waits before
each of its steps, as if the model were a very large one.

`PAT_SERVE_TEST_ENGINE` shows that the tests do not depend on the machine's speed. With `slow` every step of an engine
takes 20 ms more. With `fast` the model has one layer, and a test looks at each metric a second too late, when a fast
engine would have gone on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.integration.vllm_plugin.engine_brake import BRAKE_FILE, STEP_S

PLUGIN = Path(__file__).parent / "vllm_plugin"
ENGINE = os.environ.get("PAT_SERVE_TEST_ENGINE", "")
assert ENGINE in ("", "slow", "fast"), ENGINE
LAYERS = 1 if ENGINE == "fast" else 2
LATE_S = 1.0 if ENGINE == "fast" else 0.0
# A request of 10,000 tokens would take a quarter of an hour at this pace.
PACE_S = 0.1


class Brake:
    """The engine's brake from outside.

    Args:
        file: by which the engine is told; must not exist.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def environment(self) -> dict[str, str]:
        """Environment variables that give a server this brake."""
        paths = os.pathsep.join(filter(None, (str(PLUGIN), os.environ.get("PYTHONPATH", ""))))
        step_s = "0.02" if ENGINE == "slow" else "0"
        return {BRAKE_FILE: str(self.file), STEP_S: step_s, "VLLM_PLUGINS": "engine_brake", "PYTHONPATH": paths}

    @contextmanager
    def held(self, *, after_steps: int = 0, pace_s: float = PACE_S) -> Iterator[None]:
        """Hold the engine until the end of the block.

        Args:
            after_steps: steps that it takes freely first.
            pace_s: seconds that it waits before each other step.
        """
        order = self.file.with_suffix(".order")
        order.write_text(f"{after_steps} {pace_s}")
        order.replace(self.file)
        try:
            yield
        finally:
            self.file.unlink(missing_ok=True)

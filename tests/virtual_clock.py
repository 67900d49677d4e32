"""An event loop for tests of deadlines: its clock stands still while there is work, and jumps when there is none.

A deadline of a fifth of a second is a race, which a busy machine loses. By this clock work takes no time at all, and a
timer is due when nothing else is left to do. It is for code that waits on its loop alone, without sockets or threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """Has a time of its own, from 0."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        select = self._selector.select

        def jump(timeout_s: float | None = None) -> Any:
            assert timeout_s is not None, "nothing is left that could go on"
            self._now_s += timeout_s
            return select(0)

        self._selector.select = jump

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._now_s


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine as `asyncio.run` does, by the virtual clock."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main)

"""The CPU time of engines that take turns: the engine at work, the engine that should wait, and everybody else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import psutil


class Runner(Protocol):
    """Processes whose CPU time can be read."""

    def cpu_s(self) -> float:
        """CPU seconds that the processes have used so far."""
        ...


class CpuWatch:
    """Adds up CPU time over turns.

    The kernel counts in ticks of about 10 ms, which is too coarse for a few tiny turns.

    Args:
        front: works for whichever engine has its turn, so its time counts as that engine's.
    """

    def __init__(self, front: Runner | None = None) -> None:
        self._front = front
        self._elapsed_s = self._other_s = self._waiting_s = 0.0

    @contextmanager
    def turn(self, running: Runner, waiting: Runner) -> Iterator[None]:
        """Count the CPU time of one engine's turn."""
        begun_s, before = time.monotonic(), self._count(running, waiting)
        yield
        busy_s, running_s, waiting_s = (
            now - then for now, then in zip(self._count(running, waiting), before, strict=True)
        )
        self._elapsed_s += time.monotonic() - begun_s
        self._other_s += busy_s - running_s - waiting_s
        self._waiting_s += waiting_s

    @property
    def other_share(self) -> float:
        """Share of the whole machine that went to neither engine, or to the hypervisor, in [0, 1]."""
        share = self._other_s / (self._elapsed_s * (psutil.cpu_count() or 1))
        return min(max(share, 0.0), 1.0)

    @property
    def waiting_share(self) -> float:
        """Share of one core that the waiting engine used."""
        return self._waiting_s / self._elapsed_s

    def _count(self, running: Runner, waiting: Runner) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        # Linux counts a guest's time in user as well, so the two guest columns stay out.
        busy_s = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
        if self._front is not None:
            busy_s -= self._front.cpu_s()
        return float(busy_s), running.cpu_s(), waiting.cpu_s()

"""The processes of one engine as the kernel counts them: their CPU time, memory, age and end."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress

import psutil

_EXIT_S = 5.0


def children() -> list[psutil.Process]:
    """All processes that descend from this one."""
    return psutil.Process().children(recursive=True)


class ProcessGroup:
    """The processes of one engine.

    Args:
        processes: all of them. A process that has ended counts as it did last.
    """

    def __init__(self, processes: Iterable[psutil.Process]) -> None:
        self.processes = tuple(processes)
        self._cpu_s: dict[int, float] = {}

    def cpu_s(self) -> float:
        """CPU seconds that the processes have used so far."""
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self._cpu_s[process.pid] = float(times.user + times.system)
        return sum(self._cpu_s.values())

    def peak_memory_bytes(self) -> int:
        """Sum of the processes' peaks (Linux); where the kernel does not tell peaks, the memory that they hold now."""
        total = 0
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                total += _peak_bytes(process)
        return total

    def age_s(self) -> float:
        """Seconds since the first of the processes was started; 0 without any."""
        return time.time() - min((process.create_time() for process in self.processes), default=time.time())

    def end(self) -> None:
        """Kill the processes that are left, and leave no zombie."""
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.processes, timeout=_EXIT_S)


def _peak_bytes(process: psutil.Process) -> int:
    with suppress(OSError), open(f"/proc/{process.pid}/status", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(process.memory_info().rss)

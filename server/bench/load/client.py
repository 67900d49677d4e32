"""guidellm's command with a clock that is right: `python -m pat_serve.server.bench.load.client run ...`.

guidellm 0.8 tells its workers to start, and only afterwards sets the time of the first Poisson arrival. A worker that
is quick in between counts arrivals from the year 1970, takes them for overdue and sends them all at once.
"""

from __future__ import annotations

from typing import Any


def set_the_clock_first() -> None:
    """Replace the start of guidellm's Poisson strategy by one that sets its clock and then wakes the workers."""
    from guidellm.scheduler.strategies import AsyncPoissonStrategy, SchedulingStrategy

    def init_processes_start(self: Any, start_time: float) -> None:
        with self._offset.get_lock():
            self._offset.value = start_time
        SchedulingStrategy.init_processes_start(self, start_time)

    AsyncPoissonStrategy.init_processes_start = init_processes_start  # type: ignore[method-assign]


# guidellm's workers import this module too.
if __name__ == "__main__":
    from guidellm.cli import cli

    set_the_clock_first()
    cli()

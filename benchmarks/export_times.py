"""Divide the time of an export with its parity gate into stages.

Example: python -m benchmarks.export_times --ckpt run/ --dtypes bfloat16 float16 float32

Each export goes to a temporary folder (`TMPDIR`) in this process. A stage is timed around the function that does its
work; a stage that contains others counts the rest. Seconds of wall-clock time and of all cores' time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any

from pat_serve.export import exporter
from pat_serve.export.parity import gate as parity
from pat_serve.export.parity import models
from pat_serve.machine.hardware import describe


@dataclass(kw_only=True)
class Stages:
    """Seconds by stage: wall clock and cores' time; a stage inside another one is taken from it."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    _inner: list[list[float]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as a stage."""
        begin = time.perf_counter(), time.process_time()
        self._inner.append([0.0, 0.0])
        try:
            yield
        finally:
            taken = time.perf_counter() - begin[0], time.process_time() - begin[1]
            inner = self._inner.pop()
            total = self.seconds.setdefault(name, [0.0, 0.0])
            for clock in (0, 1):
                total[clock] += taken[clock] - inner[clock]
                if self._inner:
                    self._inner[-1][clock] += taken[clock]

    def wrap(self, owner: Any, attribute: str, name: Callable[..., str]) -> None:
        """Time every call of a function."""
        function = getattr(owner, attribute)

        @wraps(function)
        def timed(*arguments: Any, **settings: Any) -> Any:
            with self.stage(name(*arguments, **settings)):
                return function(*arguments, **settings)

        setattr(owner, attribute, timed)


def main() -> None:
    """Print a table for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="a finished run")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--walk", action="store_true", help="layer by layer")
    options = parser.parse_args()
    machine = describe()
    print(f"{datetime.now(UTC).date().isoformat()}, {machine['cpu_model']}, {machine['cpu_cores']} cores")
    stages = Stages()
    instrument(stages)
    for dtype in options.dtypes:
        stages.seconds.clear()
        with tempfile.TemporaryDirectory() as scratch, stages.stage("opening, hashing, everything else"):
            done = exporter.export_run(options.ckpt, Path(scratch) / "out", dtype=dtype, walk=options.walk or None)
        assert done.parity is not None
        print("\n".join(table(dtype, stages)), flush=True)


def instrument(stages: Stages) -> None:
    """Time the stages of `export_run`, in place."""
    stages.wrap(exporter, "_write_model", lambda *_, **__: "rewriting and writing")
    stages.wrap(exporter, "hash_files", lambda *_, **__: "hashing the files")
    stages.wrap(parity, "logit_distances", lambda *_: "comparing logits")
    for ways in (models.LoadedModels, models.WalkedModels):
        stages.wrap(ways, "exported", lambda _, dtype, *__: f"exported files, {models.dtype_name(dtype)}")
        stages.wrap(ways, "check_files", lambda _: "checking the files")
        _wrap_steps(ways, "exact", stages, ("rewriting, checking the files, its pass", "pass rounded at random"))
        _wrap_steps(ways, "trained", stages, ("trained model", "trained model again, in 16 bits"))
    stages.wrap(models, "meta_model", lambda *_: "models without weights")


def _wrap_steps(ways: Any, attribute: str, stages: Stages, names: tuple[str, ...]) -> None:
    """Time each step of a generator."""
    function = getattr(ways, attribute)

    def timed(self: Any, dtype: Any, *arguments: Any) -> Iterator[Any]:
        answers = function(self, dtype, *arguments)
        for name in names:
            with stages.stage(f"{name}, from {models.dtype_name(dtype)}"):
                found = next(answers, None)
            if found is None:
                return
            yield found
            del found

    setattr(ways, attribute, timed)


def table(dtype: str, stages: Stages) -> list[str]:
    """A Markdown table, the longest stage first."""
    total, cores = (sum(seconds[clock] for seconds in stages.seconds.values()) for clock in (0, 1))
    lines = ["", f"| {dtype} | seconds | share | cores' seconds |", "|---|---|---|---|"]
    for name, (wall, cpu) in sorted(stages.seconds.items(), key=lambda item: -item[1][0]):
        lines.append(f"| {name} | {wall:.1f} | {wall / total:.0%} | {cpu:.1f} |")
    return [*lines, f"| all | {total:.1f} | | {cores:.1f} |"]


if __name__ == "__main__":
    main()

"""What this machine can do, in a few seconds: bytes read and operations a second.

`python -m pat_serve.server.workers.probe DTYPE` prints it as JSON.

Both are measured as a model meets them, with the number format, the threads and the matrix kernels of the engine: a
product of a matrix far larger than any cache with one vector reads each weight once, and a square product does far more
operations than it reads bytes. The best of many tries counts, because whatever disturbs one only makes it slower.

The numbers are random: a GPU draws less power for constants, and is faster for it. There a try is many calls between
two events on its own clock, as an engine queues them, and not one between two looks at the host's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pat_serve.errors import EngineError
from pat_serve.server.workers.process import worker_environment

_WIDE = 4096
_SECONDS, _LEAST_TRIES = 1.5, 5
_TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much work a try is.

    Attributes:
        weight_bytes: of the matrix that is read; far more than any cache holds.
        square: rows and columns of the matrices that are multiplied.
        calls: in a try, one after the other.
    """

    weight_bytes: int
    square: int
    calls: int


# On a CPU the largest matrix of Llama-2-7B twice over in float32, and a product of some milliseconds. A GPU of 3 TB/s
# and 1 PFLOP/s takes a millisecond for its own, so that starting a kernel and filling the chip do not show.
SIZES = {
    "cpu": Sizes(weight_bytes=1 << 29, square=2048, calls=1),
    "cuda": Sizes(weight_bytes=1 << 31, square=8192, calls=20),
}


@dataclass(frozen=True, kw_only=True)
class MachineRates:
    """The two roofs.

    Attributes:
        dtype: number format of the matrices.
        bytes_per_s: weights read by a matrix-vector product.
        flops_per_s: operations of a square matrix product.
    """

    dtype: str
    bytes_per_s: float
    flops_per_s: float

    def floor_s(self, *, read_bytes: float, flops: float) -> float:
        """The least time that work can take: whichever roof is met first."""
        return max(read_bytes / self.bytes_per_s, flops / self.flops_per_s)


def probe_machine(dtype: str, *, scratch: Path) -> MachineRates:
    """Measure in a process of its own, with the threads that an engine gets.

    Args:
        dtype: float32, bfloat16 or float16.
        scratch: folder for temporary files.

    Raises:
        EngineError: the probe failed.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pat_serve.server.workers.probe", dtype],
            env=worker_environment(os.environ, scratch=scratch, offline=True),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            "probe of the machine",
            expected=f"two rates within {_TIMEOUT_S:g} s",
            found="none",
            fix="Wait until the machine is less busy, or leave the roofline out with --no-roofline.",
        ) from error
    if done.returncode:
        raise EngineError(
            "probe of the machine",
            expected="two rates",
            found=(done.stderr.strip().splitlines() or ["no output"])[-1],
            fix="Free memory (it takes 1 GiB, on a GPU 3 GiB), or leave the roofline out with --no-roofline.",
        )
    return MachineRates(**json.loads(done.stdout.splitlines()[-1]))


def measure_rates(dtype: str, *, sizes: Sizes | None = None) -> MachineRates:
    """Measure in this process, on the GPU if there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = sizes or SIZES[device]
    time_s = gpu_time_s if device == "cuda" else host_time_s

    def matrix(rows: int, columns: int) -> Any:
        return torch.empty(rows, columns, dtype=getattr(torch, dtype), device=device).uniform_(-1, 1)

    with torch.inference_mode():
        row = matrix(1, _WIDE)
        weight = matrix(sizes.weight_bytes // (_WIDE * row.element_size()), _WIDE)
        left, right = matrix(sizes.square, sizes.square), matrix(sizes.square, sizes.square)
        reading_s = _best_s(lambda: time_s(lambda: torch.nn.functional.linear(row, weight), sizes.calls))
        product_s = _best_s(lambda: time_s(lambda: left @ right, sizes.calls))
    return MachineRates(
        dtype=dtype,
        bytes_per_s=weight.numel() * weight.element_size() / reading_s,
        flops_per_s=2 * sizes.square**3 / product_s,
    )


def host_time_s(work: Callable[[], Any], calls: int) -> float:
    """Seconds of a call, of so many."""
    begun_s = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - begun_s) / calls


def gpu_time_s(work: Callable[[], Any], calls: int) -> float:
    """Seconds of a call, of so many that the GPU makes without waiting for the host."""
    import torch

    event: Any = torch.cuda.Event
    begun, ended = event(enable_timing=True), event(enable_timing=True)
    begun.record()
    for _ in range(calls):
        work()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1000 / calls


def _best_s(try_s: Callable[[], float]) -> float:
    best_s, tries, deadline_s = float("inf"), 0, time.perf_counter() + _SECONDS
    while tries < _LEAST_TRIES or time.perf_counter() < deadline_s:
        best_s, tries = min(best_s, try_s()), tries + 1
    return best_s


if __name__ == "__main__":
    sys.stdout.write(json.dumps(vars(measure_rates(sys.argv[1]))) + "\n")

"""What this machine can do, in a few seconds: bytes read and operations a second.

`python -m pat_serve.server.workers.probe DTYPE` prints it as JSON.

Both are measured as a model meets them, with the number format, the threads and the matrix kernels of the engine: a
product of a matrix far larger than any cache with one vector reads each weight once, and a square product does far more
operations than it reads bytes. The best of many tries counts, because whatever disturbs one only makes it slower.
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

# Rows and columns of the matrices: the largest of Llama-2-7B twice over, and a square one.
_WIDE, _TALL, _SQUARE = 4096, 32768, 2048
# What keeps a GPU busy for a millisecond: smaller ones time their own launch.
_GPU_TALL, _GPU_SQUARE = 8 * _TALL, 4 * _SQUARE
_SECONDS, _LEAST_TRIES = 1.5, 5
_TIMEOUT_S = 300


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
            fix="Free memory (it takes 1 GiB), or leave the roofline out with --no-roofline.",
        )
    return MachineRates(**json.loads(done.stdout.splitlines()[-1]))


def measure_rates(dtype: str) -> MachineRates:
    """Measure in this process."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    tall, side = (_GPU_TALL, _GPU_SQUARE) if device == "cuda" else (_TALL, _SQUARE)

    def random(rows: int, columns: int) -> Any:
        # A GPU multiplies constants faster than what a model holds.
        return torch.randn(rows, columns, device=device).to(kind)

    with torch.inference_mode():
        weight, row, square = random(tall, _WIDE), random(1, _WIDE), random(side, side)
        reading_s = _best_s(lambda: torch.nn.functional.linear(row, weight), device)
        product_s = _best_s(lambda: square @ square, device)
    return MachineRates(
        dtype=dtype,
        bytes_per_s=weight.numel() * weight.element_size() / reading_s,
        flops_per_s=2 * side**3 / product_s,
    )


def _best_s(work: Callable[[], Any], device: str) -> float:
    import torch

    best_s, tries, deadline_s = float("inf"), 0, time.perf_counter() + _SECONDS
    while tries < _LEAST_TRIES or time.perf_counter() < deadline_s:
        begun_s = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best_s, tries = min(best_s, time.perf_counter() - begun_s), tries + 1
    return best_s


if __name__ == "__main__":
    sys.stdout.write(json.dumps(vars(measure_rates(sys.argv[1]))) + "\n")

"""What this machine can do, in a few seconds: bytes read and operations a second.

Both are measured where the engine runs and as it runs: in its own process, with its threads, their binding and its
number format, on its own matrices through its own kernels, and beside that on a buffer far larger than any cache and
on square matrices. The best of all tries counts: whatever disturbs one only makes it slower, and a floor that another
kernel beats is none.

The numbers are random: a GPU draws less power for constants, and is faster for it. There a try is many calls between
two events on its own clock, as an engine queues them, and not one between two looks at the host's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Most rows of activations in the products that operations are counted by: beyond, no CPU's kernel gets quicker.
PROBE_ROWS = 512
_WIDE = 4096
_SECONDS, _LEAST_TRIES = 0.4, 3
_CACHES = "/sys/devices/system/cpu/cpu0/cache"
_KIB = 1024


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
class Product:
    """A matrix of an engine's and how the engine multiplies by it.

    Attributes:
        columns: of the matrix, the length of an input row.
        weights: numbers in it.
        run: multiplies rows of activations, [rows, columns], by it.
    """

    columns: int
    weights: int
    run: Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class MachineRates:
    """The two roofs.

    Attributes:
        dtype: number format of the matrices.
        bytes_per_s: read, by the quickest of the ways that were tried.
        flops_per_s: operations of matrix products, likewise.
        cache_bytes: of the CPU's last-level cache; None on a GPU, and where the system does not tell.
        own_weights: numbers in the engine's own matrices that were among what was read and multiplied.
    """

    dtype: str
    bytes_per_s: float
    flops_per_s: float
    cache_bytes: int | None = None
    own_weights: int = 0

    def floor_s(self, *, read_bytes: float, flops: float) -> float:
        """The least time that work can take: whichever roof is met first."""
        return max(read_bytes / self.bytes_per_s, flops / self.flops_per_s)


def best_rates(probes: Sequence[MachineRates]) -> MachineRates | None:
    """The higher of each roof over several probes; None for no probes."""
    if not probes:
        return None
    return MachineRates(
        dtype=probes[0].dtype,
        bytes_per_s=max(one.bytes_per_s for one in probes),
        flops_per_s=max(one.flops_per_s for one in probes),
        cache_bytes=probes[0].cache_bytes,
        own_weights=max(one.own_weights for one in probes),
    )


def measure_rates(
    dtype: str, *, products: Sequence[Product] = (), rows: int = 1, sizes: Sizes | None = None
) -> MachineRates:
    """Measure in this process, on the GPU if there is one.

    Args:
        dtype: float32, bfloat16 or float16.
        products: an engine's own matrices.
        rows: of activations by which these are multiplied where operations are counted: the tokens of a prefill.
        sizes: of the work beside them; the device's own unless given.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = sizes or SIZES[device]
    time_s = gpu_time_s if device == "cuda" else host_time_s

    def matrix(height: int, width: int) -> Any:
        return torch.empty(height, width, dtype=getattr(torch, dtype), device=device).uniform_(-1, 1)

    def best_s(work: Callable[[], Any]) -> float:
        return _best_s(lambda: time_s(work, sizes.calls))

    def sweep(height: int) -> Callable[[], Any]:
        inputs = {width: matrix(height, width) for width in {one.columns for one in products}}
        return lambda: [one.run(inputs[one.columns]) for one in products]

    with torch.inference_mode():
        row = matrix(1, _WIDE)
        reading = _reading(row, matrix(sizes.weight_bytes // (_WIDE * row.element_size()), _WIDE), best_s)
        left, right = matrix(sizes.square, sizes.square), matrix(sizes.square, sizes.square)
        multiplying = [2 * sizes.square**3 / best_s(lambda: left @ right)]
        if products:
            weights = sum(one.weights for one in products)
            reading.append(weights * row.element_size() / best_s(sweep(1)))
            multiplying.append(2 * rows * weights / best_s(sweep(rows)))
    return MachineRates(
        dtype=dtype,
        bytes_per_s=max(reading),
        flops_per_s=max(multiplying),
        cache_bytes=last_level_cache_bytes() if device == "cpu" else None,
        own_weights=sum(one.weights for one in products),
    )


def _reading(row: Any, weight: Any, best_s: Callable[[Callable[[], Any]], float]) -> list[float]:
    """Bytes a second at which a large matrix is read, in each of several ways."""
    import torch

    ways: list[Callable[[], Any]] = [lambda: torch.nn.functional.linear(row, weight)]
    if weight.device.type == "cpu":
        # A product with one row need not read the fastest: in 16 bits torch's own converts as it goes.
        ways.append(lambda: torch.max(weight.view(torch.int32)))
    return [weight.numel() * weight.element_size() / best_s(way) for way in ways]


def last_level_cache_bytes(caches: str = _CACHES) -> int | None:
    """Size of the largest cache that the first core sees; None where the system does not tell.

    Args:
        caches: folder in which Linux describes them.
    """
    sizes = [path.read_text().strip() for path in Path(caches).glob("index*/size")]
    return max((int(size.removesuffix("K")) * _KIB for size in sizes if size.removesuffix("K").isdigit()), default=None)


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

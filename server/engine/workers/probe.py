"""A probe of this machine, in a few seconds: bytes that it reads and operations that it makes in a second.

Both rates are measured where the engine runs and as it runs: in its own process, with its threads, their binding and
its number format, on its own matrices through its own kernels. They are also measured on a buffer far larger than any
cache and on square matrices. The best of all tries counts, because a disturbance only makes a try slower, and because a
floor that another kernel beats is no floor.

The numbers are random, because a GPU draws less power for constants and is then faster. A try on a GPU is many calls
between two events on the GPU's own clock, as an engine queues them. One call between two looks at the host's clock
would measure the wait for the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The most rows of activations in the products by which operations are counted. No CPU's kernel is quicker with more
# rows.
PROBE_ROWS = 512
_WIDE = 4096
_SECONDS, _LEAST_TRIES = 0.4, 3
_CACHES = "/sys/devices/system/cpu/cpu0/cache"
_KIB = 1024


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The amount of work in a try.

    Attributes:
        weight_bytes: size of the matrix that is read; far more than any cache holds.
        square: rows and columns of the matrices that are multiplied.
        calls: calls in a try, one after the other.
    """

    weight_bytes: int
    square: int
    calls: int


# A CPU reads twice the size of Llama-2-7B's largest matrix in float32, and makes a product of some milliseconds. A GPU
# of 3 TB/s and 1 PFLOP/s takes a millisecond for its sizes, so that starting a kernel and filling the chip do not show.
SIZES = {
    "cpu": Sizes(weight_bytes=1 << 29, square=2048, calls=1),
    "cuda": Sizes(weight_bytes=1 << 31, square=8192, calls=20),
}


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix of an engine, and the engine's own kernel for it.

    Attributes:
        columns: columns of the matrix, which are the length of an input row.
        weights: numbers in the matrix.
        run: multiplies rows of activations, [rows, columns], by the matrix.
    """

    columns: int
    weights: int
    run: Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class MachineRates:
    """The two roofs of a machine: bytes and operations a second.

    Attributes:
        dtype: number format of the matrices.
        bytes_per_s: bytes read in a second, in the quickest of the ways that were tried.
        flops_per_s: operations of matrix products in a second, in the quickest of the ways.
        cache_bytes: size of the CPU's last-level cache; None on a GPU, and where the system does not tell.
        own_weights: numbers in the engine's own matrices, where these were read and multiplied too.
    """

    dtype: str
    bytes_per_s: float
    flops_per_s: float
    cache_bytes: int | None = None
    own_weights: int = 0

    def floor_s(self, *, read_bytes: float, flops: float) -> float:
        """The least time in seconds that work can take: the roof that is met first decides."""
        return max(read_bytes / self.bytes_per_s, flops / self.flops_per_s)


def best_rates(probes: Sequence[MachineRates]) -> MachineRates | None:
    """The highest of each roof over several probes; None without probes."""
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
        rows: rows of activations in the products by which operations are counted: the tokens of a prefill.
        sizes: sizes of the other work; the device's own unless given.
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
        # A product with one row is not always the fastest read: in 16 bits torch's own kernel converts as it goes.
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
    """Mean seconds of a call, on the host's clock."""
    begun_s = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - begun_s) / calls


def gpu_time_s(work: Callable[[], Any], calls: int) -> float:
    """Mean seconds of a call, on the GPU's clock; the GPU makes all calls without waiting for the host."""
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

"""Costs of a byte, an operation, a layer and a step on a machine, fitted to measured times. Pure mathematics.

Bytes and operations alone say what a step takes at least. On small models much of a step is work that no size changes:
starting kernels once for each layer, and scheduler and sampler once for each step. Here a step takes the sum

    byte_s * bytes + flop_s * FLOPs + layer_s * layers + step_s.

The sum is linear, so a few times of models of other depths and widths give its four terms by least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import combinations

import numpy as np

from pat_serve.shapes.roofline import decode_flops, prefill_bytes, prefill_flops
from pat_serve.shapes.sizes import ModelSizes, decode_bytes


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of a step, counted from a model's sizes.

    Attributes:
        read_bytes: of weights and of the KV cache.
        flops: operations.
        layers: of the model.
        steps: 1, or as many steps as were timed together.
    """

    read_bytes: float
    flops: float
    layers: float
    steps: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Seconds of a byte, of an operation, of a layer and of a step, beside each other."""

    byte_s: float
    flop_s: float
    layer_s: float
    step_s: float

    def seconds(self, work: Work) -> float:
        """Time of a step that does this work."""
        return float(np.dot(astuple(self), astuple(work)))


def decode_work(sizes: ModelSizes, *, batch_size: int, context_tokens: float, dtype_bytes: int) -> Work:
    """Work of one decode step.

    Args:
        sizes: of the model.
        batch_size: requests.
        context_tokens: mean number of tokens in a request's KV cache.
        dtype_bytes: bytes of one weight and of one KV value.
    """
    return Work(
        read_bytes=decode_bytes(sizes, batch_size=batch_size, context_tokens=context_tokens, dtype_bytes=dtype_bytes),
        flops=decode_flops(sizes, batch_size=batch_size, context_tokens=context_tokens),
        layers=sizes.layers,
    )


def prefill_work(sizes: ModelSizes, *, batch_size: int, prompt_tokens: int, dtype_bytes: int) -> Work:
    """Work of the step that reads the prompts of a batch.

    Args:
        sizes: of the model.
        batch_size: requests.
        prompt_tokens: tokens of each prompt.
        dtype_bytes: bytes of one weight and of one KV value.
    """
    return Work(
        read_bytes=prefill_bytes(sizes, batch_size=batch_size, prompt_tokens=prompt_tokens, dtype_bytes=dtype_bytes),
        flops=prefill_flops(sizes, batch_size=batch_size, prompt_tokens=prompt_tokens),
        layers=sizes.layers,
    )


def fit_costs(work: Sequence[Work], seconds: Sequence[float]) -> StepCosts | None:
    """Costs, none below 0, with the least squares of relative errors.

    A cost of 0 is one that the times do not show: then the best fit of the other three is taken, and so on.

    Args:
        work: what was done.
        seconds: that it took.

    Returns:
        None where the work does not tell the four apart, as with one depth, or with decode steps of one batch alone.
    """
    if not work:
        return None
    rows = np.array([astuple(one) for one in work]) / np.asarray(seconds, dtype=np.float64)[:, None]
    units = np.abs(rows).max(axis=0)
    # Below a thousandth of the largest, a direction is rounding, or the noise of the times.
    if (units == 0).any() or np.linalg.matrix_rank(rows / units, tol=1e-3 * len(rows)) < rows.shape[1]:
        return None
    best: tuple[float, np.ndarray] | None = None
    for size in range(1, 5):
        for columns in combinations(range(4), size):
            some = np.zeros(4)
            some[list(columns)] = np.linalg.lstsq((rows / units)[:, columns], np.ones(len(rows)), rcond=None)[0]
            error = float(np.sum((rows / units @ some - 1) ** 2))
            if (some >= 0).all() and (best is None or error < best[0]):
                best = error, some / units
    assert best is not None, "one positive column fits ones with a positive factor"
    byte_s, flop_s, layer_s, step_s = (float(cost) for cost in best[1])
    return StepCosts(byte_s=byte_s, flop_s=flop_s, layer_s=layer_s, step_s=step_s)


def worst_error(costs: StepCosts, work: Sequence[Work], seconds: Sequence[float]) -> float:
    """The largest relative distance of a fitted time from its measured one."""
    return max(abs(costs.seconds(one) / taken_s - 1) for one, taken_s in zip(work, seconds, strict=True))

"""Costs of a byte, an operation, a layer and a step on this machine, by a quick probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pat_serve.errors import UsageError
from pat_serve.machine.hardware import DTYPE_BYTES
from pat_serve.machine.layer_probe import probe_layers
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.shapes.step_cost import StepCosts, Work, decode_work, fit_costs, prefill_work, worst_error

# Times of a quiet machine are met within a quarter; the sum of four costs is no more exact than that.
_QUIET = 0.3


@dataclass(frozen=True, kw_only=True)
class FoundCosts:
    """Costs, and what they come from.

    Attributes:
        costs: of a byte, an operation, a layer and a step.
        source: where the times come from, for the reader.
        dtype: that was timed.
        times: number of times that the costs are fitted to.
        worst_error: the largest relative distance of a fitted time from its measured one.
    """

    costs: StepCosts
    source: str
    dtype: str
    times: int
    worst_error: float

    @property
    def remark(self) -> str | None:
        """A warning that another program disturbed the measured times; None where the costs meet these times."""
        if self.worst_error <= _QUIET:
            return None
        return "The times scatter so much that another program was probably at work: measure again on a quiet machine."


def probed_costs(base: ModelSizes, dtype: str) -> FoundCosts:
    """Time torch layers of a model's sizes on this machine; a few seconds.

    Args:
        base: sizes of the model.
        dtype: float32, bfloat16 or float16.

    Raises:
        UsageError: the times do not tell the costs apart.
    """
    work, seconds = [], []
    for timed in probe_layers(base, dtype):
        sizes, step = timed.sizes, timed.step
        if step.prefill:
            counted = prefill_work(
                sizes, batch_size=step.batch_size, prompt_tokens=step.tokens, dtype_bytes=DTYPE_BYTES[dtype]
            )
        else:
            counted = decode_work(
                sizes, batch_size=step.batch_size, context_tokens=step.tokens, dtype_bytes=DTYPE_BYTES[dtype]
            )
        work.append(counted)
        seconds.append(timed.seconds)
    return fitted_costs(
        work, seconds, f"torch layers of the model's own sizes on this machine, {dtype}", dtype, "--probe"
    )


def fitted_costs(work: Sequence[Work], seconds: Sequence[float], source: str, dtype: str, flag: str) -> FoundCosts:
    """Costs that meet times.

    Args:
        work: what was done.
        seconds: that it took.
        source: where the times come from, for the reader.
        dtype: that was timed.
        flag: that asked for them, for the message.

    Raises:
        UsageError: the times do not tell the costs apart.
    """
    costs = fit_costs(work, seconds)
    if costs is None:
        raise UsageError(
            flag,
            expected="times of prefill and decode, of two depths and two widths",
            found=f"{len(work)} times that do not tell a byte, an operation, a layer and a step apart",
            fix="Record more: pat-bench speedup ... --layers 2,6 --out FILE.json.",
        )
    return FoundCosts(
        costs=costs, source=source, dtype=dtype, times=len(work), worst_error=worst_error(costs, work, seconds)
    )

"""Costs of a byte, an operation, a layer and a step here: from recorded results of pat-bench, or by a quick probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pat_serve.errors import UsageError
from pat_serve.machine.layer_probe import probe_layers
from pat_serve.server.analysis.step_cost import StepCosts, Work, decode_work, fit_costs, prefill_work, worst_error
from pat_serve.server.bench.report.read import read_result
from pat_serve.server.bench.speedup.grid import Regime
from pat_serve.server.bench.speedup.result import SpeedupResult
from pat_serve.shapes.sizes import ModelSizes

_MACHINE_KEYS = ("accelerator", "cpu_model", "cpu_cores")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
                sizes, batch_size=step.batch_size, prompt_tokens=step.tokens, dtype_bytes=_BYTES[dtype]
            )
        else:
            counted = decode_work(
                sizes, batch_size=step.batch_size, context_tokens=step.tokens, dtype_bytes=_BYTES[dtype]
            )
        work.append(counted)
        seconds.append(timed.seconds)
    return _fitted(work, seconds, f"torch layers of the model's own sizes on this machine, {dtype}", dtype, "--probe")


def recorded_costs(paths: Sequence[Path]) -> FoundCosts:
    """Take the times of real engines from results of pat-bench speedup.

    Args:
        paths: of the results; of one kind of machine and one dtype.

    Raises:
        UsageError: no result, one of another kind, of other machines or dtypes, or too few different times.
    """
    work, seconds = [], []
    results = [_speedup_result(path) for path in paths]
    for path, result in zip(paths, results, strict=True):
        for key, mine, first in [
            ("dtype", result.dtype, results[0].dtype),
            *((key, result.machine.get(key), results[0].machine.get(key)) for key in _MACHINE_KEYS),
        ]:
            if mine != first:
                raise UsageError(
                    f"--results {path}",
                    expected=f"{key} {first}, as in {paths[0]}",
                    found=str(mine),
                    fix="Give results of one kind of machine and one dtype.",
                )
        for depth in result.depths:
            for one in depth.regimes:
                for sizes, taken in ((depth.baseline.shape, one.baseline), (depth.candidate.shape, one.candidate)):
                    work.append(_work(one.regime, sizes, one.batch_size, one.context_tokens, _BYTES[result.dtype]))
                    seconds.append(taken.median)
    names = ", ".join(path.name for path in paths)
    return _fitted(
        work, seconds, f"vLLM's times in {names}, {results[0].dtype}", results[0].dtype, f"--results {names}"
    )


def _work(regime: Regime, sizes: ModelSizes, batch_size: int, tokens: float, dtype_bytes: int) -> Work:
    if regime is Regime.PREFILL:
        return prefill_work(sizes, batch_size=batch_size, prompt_tokens=round(tokens), dtype_bytes=dtype_bytes)
    return decode_work(sizes, batch_size=batch_size, context_tokens=tokens, dtype_bytes=dtype_bytes)


def _speedup_result(path: Path) -> SpeedupResult:
    result = read_result(path)
    if not isinstance(result, SpeedupResult) or result.settings.fixed_memory:
        raise UsageError(
            f"--results {path}",
            expected="a result of pat-bench speedup with equal batches",
            found="one with --fixed-memory" if isinstance(result, SpeedupResult) else f"one of {result.kind}",
            fix="Record one: pat-bench speedup ... --layers 2,6 --out FILE.json.",
        )
    return result


def _fitted(work: Sequence[Work], seconds: Sequence[float], source: str, dtype: str, flag: str) -> FoundCosts:
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

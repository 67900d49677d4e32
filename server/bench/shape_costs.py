"""Costs of a byte, an operation, a layer and a step from recorded results of pat-bench."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pat_serve.errors import UsageError
from pat_serve.machine.hardware import DTYPE_BYTES
from pat_serve.machine.probed_costs import FoundCosts, fitted_costs
from pat_serve.server.bench.report.read import read_result
from pat_serve.server.bench.speedup.grid import Regime
from pat_serve.server.bench.speedup.result import SpeedupResult
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.shapes.step_cost import Work, decode_work, prefill_work

_MACHINE_KEYS = ("accelerator", "cpu_model", "cpu_cores")


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
                    work.append(_work(one.regime, sizes, one.batch_size, one.context_tokens, DTYPE_BYTES[result.dtype]))
                    seconds.append(taken.median)
    names = ", ".join(path.name for path in paths)
    return fitted_costs(
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

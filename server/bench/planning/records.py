"""The step times of one model, from recorded measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pat_serve.errors import UsageError
from pat_serve.server.analysis.trace import BatchTrace
from pat_serve.server.bench.equal_memory.result import EqualMemoryResult
from pat_serve.server.bench.latency.result import LatencyResult, ThroughputResult
from pat_serve.server.bench.planning.steps import MeasuredCell
from pat_serve.server.bench.report.read import read_result
from pat_serve.server.bench.speedup.result import SpeedupResult
from pat_serve.shapes.sizes import ModelSizes

Role = Literal["baseline", "candidate"]
_MACHINE_KEYS = ("accelerator", "cpu_model", "cpu_cores")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measurements of one model.

    Attributes:
        role: the model's role in the plan, baseline or candidate.
        name: name of the model in its records.
        config_sha256: of its config.json.
        dtype: number format in which it was measured.
        shape: its sizes.
        machine: the machine that was measured on.
        sources: the files of the records.
        cells: the grid of step times.
        throughputs: records to check the step times against.
        memory_bytes: for weights and KV cache, where a record of `pat-bench equal-memory` names it.
    """

    role: Role
    name: str
    config_sha256: str
    dtype: str
    shape: ModelSizes
    machine: dict[str, str | int | list[str]]
    sources: tuple[str, ...]
    cells: tuple[MeasuredCell, ...]
    throughputs: tuple[ThroughputResult, ...]
    memory_bytes: int | None = None


def read_measured(paths: Sequence[Path], *, role: Role) -> Measured:
    """Read one model's records, and put them together.

    Args:
        paths: of latency, throughput or speedup results; of a speed-up check the side that `role` names is taken.
        role: the model's role in the plan, baseline or candidate.

    Raises:
        UsageError: a file is no result or one of another kind, the records are of different models or machines, or no
            grid is among them.
    """
    flag, parts = f"--{role}", []
    for path in paths:
        result = read_result(path)
        if isinstance(result, SpeedupResult):
            parts.append(_of_speedup(path, result, role))
        elif isinstance(result, LatencyResult | ThroughputResult):
            parts.append(_of_measure(path, result, role))
        elif isinstance(result, EqualMemoryResult):
            parts.append(_of_equal_memory(path, result, role))
        else:
            raise UsageError(
                f"{flag} {path}",
                expected="a result of pat-bench latency, throughput, speedup or equal-memory",
                found=f"one of pat-bench {result.kind}",
                fix="Measure the model with pat-bench latency --out FILE.json.",
            )
    first = parts[0]
    for other in parts[1:]:
        if (other.config_sha256, other.dtype) != (first.config_sha256, first.dtype):
            raise UsageError(
                f"{flag} {other.sources[0]}",
                expected=f"another measurement of {first.name} in {first.dtype}, as {first.sources[0]} is",
                found=f"{other.name} in {other.dtype}, with another config.json or dtype",
                fix="Name one model's files.",
            )
        check_same_machine(first, other)
    cells = tuple(cell for part in parts for cell in part.cells)
    if not cells:
        raise UsageError(
            flag,
            expected="a grid of prefill and decode times",
            found="throughput alone, in which they are mixed",
            fix="Add pat-bench latency's record of the same model.",
        )
    return replace(
        first,
        sources=tuple(source for part in parts for source in part.sources),
        cells=cells,
        throughputs=tuple(one for part in parts for one in part.throughputs),
        memory_bytes=next((part.memory_bytes for part in parts if part.memory_bytes is not None), None),
    )


def check_same_machine(first: Measured, other: Measured) -> None:
    """Refuse to count the engines of two kinds of machine together.

    Raises:
        UsageError: accelerator, CPU or cores differ.
    """
    for key in _MACHINE_KEYS:
        if first.machine.get(key) != other.machine.get(key):
            raise UsageError(
                other.sources[0],
                expected=f"{key} {first.machine.get(key)}, as in {first.sources[0]}",
                found=str(other.machine.get(key)),
                fix="Measure both on the same kind of machine.",
            )


def _of_measure(path: Path, result: LatencyResult | ThroughputResult, role: Role) -> Measured:
    cells: tuple[MeasuredCell, ...] = ()
    if isinstance(result, LatencyResult):
        cells = tuple(
            _cell(cell.traces, cell.batch_size, cell.prompt_tokens, cell.output_tokens) for cell in result.cells
        )
    return Measured(
        role=role,
        name=result.model,
        config_sha256=result.config_sha256,
        dtype=result.dtype,
        shape=result.shape,
        machine=result.machine,
        sources=(str(path),),
        cells=cells,
        throughputs=(result,) if isinstance(result, ThroughputResult) else (),
    )


def _of_speedup(path: Path, result: SpeedupResult, role: Role) -> Measured:
    record = result.baseline if role == "baseline" else result.candidate
    settings, traces = result.settings, dict[tuple[int, int], list[BatchTrace]]()
    for one in result.rounds:
        trace = one.baseline if role == "baseline" else one.candidate
        traces.setdefault((trace.batch_size, trace.prompt_tokens or settings.prompt_tokens), []).append(trace)
    return Measured(
        role=role,
        name=record.name,
        config_sha256=record.config_sha256,
        dtype=result.dtype,
        shape=record.shape,
        machine=result.machine,
        sources=(str(path),),
        cells=tuple(
            _cell(made, batch, prompt, settings.generated_tokens) for (batch, prompt), made in sorted(traces.items())
        ),
        throughputs=(),
    )


def _of_equal_memory(path: Path, result: EqualMemoryResult, role: Role) -> Measured:
    model = result.model(role)
    return Measured(
        role=role,
        name=model.name,
        config_sha256=model.config_sha256,
        dtype=result.dtype,
        shape=model.shape,
        machine=result.machine,
        sources=(str(path),),
        cells=(),
        throughputs=(),
        memory_bytes=result.memory_bytes,
    )


def _cell(traces: Sequence[BatchTrace], batch_size: int, prompt_tokens: int, output_tokens: int) -> MeasuredCell:
    # Means count here, since an engine's throughput is one over the mean of its steps, disturbed ones included.
    steps_s = [step_s for trace in traces for step_s in trace.decode_steps_s]
    return MeasuredCell(
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prefill_s=sum(trace.ttft_s for trace in traces) / len(traces),
        step_s=sum(steps_s) / len(steps_s) if steps_s else None,
    )

"""Every figure of any result as flat rows, of which CSV files and side-by-side tables are made. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields

from pydantic import BaseModel

from pat_serve.server.analysis.capacity import Capacity
from pat_serve.server.analysis.statistics import Summary
from pat_serve.server.bench.equal_memory.result import ROLES, EqualMemoryResult
from pat_serve.server.bench.latency.result import Distribution, LatencyResult, Roof, ThroughputResult
from pat_serve.server.bench.load.result import LoadResult
from pat_serve.server.bench.planning.result import PlanResult
from pat_serve.server.bench.speculative.result import SpeculativeResult
from pat_serve.server.bench.speedup.result import SpeedupResult

_PERCENTILES = (("p50", "p50"), ("p90", "p90"), ("p99", "p99"), ("p99_9", "p99.9"))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of a result.

    Attributes:
        kind: kind of the result.
        model: the model that the figure belongs to.
        where: the point of the grid: batch, prompt, output, rate.
        figure: its name, with its statistic.
        unit: s, 1/s, bytes, or empty for a ratio.
        value: the figure.
        low: lower end of its interval where it has one.
        high: upper end.
        ceiling: the bound by counted bytes and FLOPs: the least for seconds, the most for rates and ratios.
        reached: share of the ceiling; None also for a floor that was beaten.
    """

    kind: str
    model: str
    where: str
    figure: str
    unit: str
    value: float
    low: float | None = None
    high: float | None = None
    ceiling: float | None = None
    reached: float | None = None


def rows_of(result: BaseModel) -> Iterator[Row]:
    """All figures of a result, in its own order."""
    if isinstance(result, SpeedupResult):
        yield from _speedup(result)
    elif isinstance(result, LatencyResult):
        yield from _latency(result)
    elif isinstance(result, ThroughputResult):
        yield from _throughput(result)
    elif isinstance(result, LoadResult):
        yield from _load(result)
    elif isinstance(result, EqualMemoryResult):
        yield from _equal_memory(result)
    elif isinstance(result, SpeculativeResult):
        yield from _speculative(result)
    elif isinstance(result, PlanResult):
        yield from _plan(result)


def csv_text(results: Iterable[BaseModel]) -> str:
    """All figures of results as CSV with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for result in results:
        writer.writerows(asdict(row) for row in rows_of(result))
    return text.getvalue()


def _speedup(result: SpeedupResult) -> Iterator[Row]:
    models = _names(result)
    pair = f"{models['baseline']} / {models['candidate']}"
    for one in result.extrapolated:
        where = f"{one.name}, context {one.context_tokens:g}"
        for role, fit in (("baseline", one.baseline), ("candidate", one.candidate)):
            for figure, value, low, high in (
                ("duration", fit.total_s, None, None),
                ("fixed", fit.fixed_s, fit.fixed_low_s, fit.fixed_high_s),
                ("a layer", fit.layer_s, fit.layer_low_s, fit.layer_high_s),
            ):
                yield Row(kind="speedup", model=models[role], where=where, figure=figure, unit="s", value=value,
                          low=low, high=high)  # fmt: skip
        yield Row(
            kind="speedup", model=pair, where=where, figure="speed-up", unit="", value=one.ratio.median,
            low=one.ratio.low, high=one.ratio.high, ceiling=one.ceiling, reached=one.of_ceiling,
        )  # fmt: skip
    for layers, regime in [(depth.layers, one) for depth in result.depths for one in depth.regimes]:
        at = f", {layers} layers" if result.shallower else ""
        where = f"{regime.name}{at}, context {regime.context_tokens:g}"
        durations: Sequence[tuple[str, Summary, Roof | None]] = (
            ("baseline", regime.baseline, regime.baseline_roof),
            ("candidate", regime.candidate, regime.candidate_roof),
        )
        for role, summary, roof in durations:
            yield Row(
                kind="speedup", model=models[role], where=where, figure="duration p50", unit="s", value=summary.p50,
                ceiling=roof.floor_s if roof else None, reached=roof.reached if roof and roof.held else None,
            )  # fmt: skip
        yield Row(
            kind="speedup",
            model=pair,
            where=where,
            figure="speed-up",
            unit="",
            value=regime.ratio.median,
            low=regime.ratio.low,
            high=regime.ratio.high,
            ceiling=regime.ceiling,
            reached=regime.of_ceiling,
        )
    if result.average is not None:
        average = result.average
        yield Row(
            kind="speedup", model=pair, where="prefill, average over batches", figure="speed-up", unit="",
            value=average.median, low=average.low, high=average.high,
        )  # fmt: skip
    for role, model in (("baseline", result.baseline), ("candidate", result.candidate)):
        figures = [("process peak", "bytes", model.peak_memory_bytes)]
        if model.gpu_memory_bytes is not None:
            figures.append(("GPU peak", "bytes", model.gpu_memory_bytes))
        if model.capacity is not None:
            figures += _capacity_figures(model.capacity)
        for figure, unit, value in figures:
            yield Row(kind="speedup", model=models[role], where="memory", figure=figure, unit=unit, value=value)
    for role, whole in zip(("baseline", "candidate"), result.whole_capacities, strict=False):
        for figure, unit, value in _capacity_figures(whole):
            yield Row(
                kind="speedup", model=models[role], where="memory, whole models", figure=figure, unit=unit, value=value
            )


def _capacity_figures(held: Capacity) -> list[tuple[str, str, int]]:
    """Figure, unit and value of a model's share of a memory budget."""
    return [
        ("weights", "bytes", held.weight_bytes),
        ("KV cache of a request", "bytes", held.kv_bytes_per_request),
        ("requests in equal memory", "", held.requests),
    ]


def _names(result: SpeedupResult) -> dict[str, str]:
    """A model's name by role; a model checked against itself (A/A) gets its role added."""
    names = {"baseline": result.baseline.name, "candidate": result.candidate.name}
    if names["baseline"] == names["candidate"]:
        return {role: f"{name} ({role})" for role, name in names.items()}
    return names


def _latency(result: LatencyResult) -> Iterator[Row]:
    for cell in result.cells:
        where = f"batch {cell.batch_size}, prompt {cell.prompt_tokens}, output {cell.output_tokens}"
        for name, times, roof in (
            ("TTFT", cell.ttft, cell.ttft_roof),
            ("TPOT", cell.tpot, cell.tpot_roof),
            ("ITL", cell.itl, None),
            ("E2E", cell.e2e, None),
        ):
            for row in _times("latency", result.model, where, name, times):
                # A floor belongs to the median, because bytes and FLOPs do not explain the tail.
                if roof is not None and row.figure.endswith("p50"):
                    yield Row(
                        **{**asdict(row), "ceiling": roof.floor_s, "reached": roof.reached if roof.held else None}
                    )
                else:
                    yield row
    yield from _peaks("latency", result)


def _throughput(result: ThroughputResult) -> Iterator[Row]:
    for run in result.runs:
        where, roof = f"{run.concurrency} in flight", run.roof_tokens_per_s
        yield Row(
            kind="throughput", model=result.model, where=where, figure="tokens", unit="1/s",
            value=run.output_tokens_per_s, ceiling=roof,
            reached=run.output_tokens_per_s / roof if roof and run.output_tokens_per_s <= roof else None,
        )  # fmt: skip
        yield Row(
            kind="throughput", model=result.model, where=where, figure="requests", unit="1/s", value=run.requests_per_s
        )
        yield from _times("throughput", result.model, where, "TTFT", run.ttft)
        yield from _times("throughput", result.model, where, "TPOT", run.tpot)
    yield from _peaks("throughput", result)


def _equal_memory(result: EqualMemoryResult) -> Iterator[Row]:
    where = f"{result.memory_bytes / 2**30:.3g} GiB"
    for role in ROLES:
        model = result.model(role)
        for figure, unit, value in (
            ("weights", "bytes", model.capacity.weight_bytes),
            ("KV cache", "bytes", model.kv_cache_bytes),
            ("requests that fit", "", model.capacity.requests),
            ("requests in flight", "", result.in_flight(role)),
            ("output tokens", "1/s", result.tokens_per_s(role)),
            ("goodput", "1/s", result.goodput_per_s(role)),
        ):
            yield Row(kind=result.kind, model=model.name, where=where, figure=figure, unit=unit, value=value)
    pair = f"{result.candidate.name} / {result.baseline.name}"
    for figure, ratio in (("tokens ratio", result.tokens_ratio), ("goodput ratio", result.goodput_ratio)):
        if ratio is not None:
            yield Row(kind=result.kind, model=pair, where=where, figure=figure, unit="", value=ratio.median,
                      low=ratio.low, high=ratio.high)  # fmt: skip


def _load(result: LoadResult) -> Iterator[Row]:
    for run in result.runs:
        for figure, value in (
            ("requests", run.requests_per_s),
            ("tokens", run.output_tokens_per_s),
            ("goodput", run.goodput_per_s),
        ):
            if value is not None:
                yield Row(kind="load", model=result.model, where=run.name, figure=figure, unit="1/s", value=value)
        for name, times in (("TTFT", run.ttft), ("TPOT", run.tpot), ("E2E", run.e2e)):
            yield from _times("load", result.model, run.name, name, times)
        yield Row(kind="load", model=result.model, where=run.name, figure="errors", unit="", value=run.errored)


def _speculative(result: SpeculativeResult) -> Iterator[Row]:
    where, ratio = f"{result.settings.draft_tokens} proposed by {result.draft}", result.ratio

    def row(figure: str, value: float, low: float | None = None, high: float | None = None) -> Row:
        return Row(
            kind="speculative", model=result.model, where=where, figure=figure, unit="", value=value, low=low, high=high
        )

    yield row("speed-up", ratio.median, ratio.low, ratio.high)
    yield row("accepted share", result.acceptance)
    yield row("tokens per step", result.tokens_per_step)
    yield row("identical outputs", result.identical / len(result.rounds))


def _plan(result: PlanResult) -> Iterator[Row]:
    where = f"{result.settings.rate:g} requests/s"
    for model in result.models:
        for figure, unit, value in (
            ("engines", "", model.replicas),
            ("capacity of one", "1/s", model.capacity_per_s),
            ("good requests", "", model.good_share),
            ("cost an hour", "", model.cost_per_hour),
        ):
            if value is not None:
                at = f"{model.role}, {where}"
                yield Row(kind="plan", model=model.model, where=at, figure=figure, unit=unit, value=value)
        for name, times in (("TTFT", model.ttft), ("TPOT", model.tpot), ("E2E", model.e2e)):
            yield from _times("plan", model.model, f"{model.role}, {where}", name, times)


def _times(kind: str, model: str, where: str, name: str, times: Distribution | None) -> Iterator[Row]:
    if times is not None:
        for field, label in _PERCENTILES:
            yield Row(
                kind=kind, model=model, where=where, figure=f"{name} {label}", unit="s", value=getattr(times, field)
            )


def _peaks(kind: str, result: LatencyResult | ThroughputResult) -> Iterator[Row]:
    for figure, value in (("process peak", result.peak_memory_bytes), ("GPU peak", result.gpu_memory_bytes)):
        if value is not None:
            yield Row(kind=kind, model=result.model, where="memory", figure=figure, unit="bytes", value=value)

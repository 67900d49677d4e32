"""The records of `pat-bench latency` and `pat-bench throughput`: settings, raw samples, figures. Written as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pat_serve.server.analysis.statistics import percentile
from pat_serve.server.analysis.trace import BatchTrace, RequestTrace
from pat_serve.server.bench.recorded_sizes import RecordedSizes
from pat_serve.server.engine.workers.probe import MachineRates

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Location and tail of a sample of seconds."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p99: float
    p99_9: float
    max: float


def distribution(samples: Sequence[float]) -> Distribution:
    """Percentiles of a sample.

    Raises:
        ValueError: no samples.
    """
    p50, p90, p99, p99_9 = (percentile(samples, q) for q in (50, 90, 99, 99.9))
    return Distribution(
        count=len(samples),
        mean=sum(samples) / len(samples),
        min=min(samples),
        p50=p50,
        p90=p90,
        p99=p99,
        p99_9=p99_9,
        max=max(samples),
    )


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSettings(_Record):
    """The settings of one model's engine.

    Attributes:
        layers: cut the model to so many layers (random weights only).
        load_format: "auto" for real weights, "dummy" for random ones.
        dtype: "auto" lets the machine decide.
        enforce_eager: run without torch.compile.
        roofline: probe the machine and put the ceiling beside the figures.
        seed: of prompts and random weights.
    """

    layers: int | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: str = "auto"
    enforce_eager: bool = True
    roofline: bool = True
    seed: int = 0


class LatencySettings(EngineSettings):
    """The grid of `pat-bench latency`: every batch size with every prompt length and every output length."""

    batch_sizes: tuple[int, ...] = (1,)
    prompt_tokens: tuple[int, ...] = (128,)
    output_tokens: tuple[int, ...] = (32,)
    rounds: int = 10


class ThroughputSettings(EngineSettings):
    """The loads of `pat-bench throughput`.

    Attributes:
        concurrencies: numbers of requests at once, measured one after the other.
        saturate: double the last number afterwards, until a doubling gains less than a twentieth.
        max_concurrency: bound of the doubling.
        prompt_tokens: of each request.
        output_tokens: of each request, exactly.
        waves: requests in a run, as a multiple of its concurrency.
    """

    concurrencies: tuple[int, ...] = (1, 4)
    saturate: bool = True
    max_concurrency: int = 64
    prompt_tokens: int = 64
    output_tokens: int = 16
    waves: int = 3


class Roof(_Record):
    """A figure's ceiling.

    Attributes:
        floor_s: the least seconds that counted bytes and FLOPs allow on the probed machine.
        reached: floor over the measured median.
        beaten_by: the fault of a floor that the measured median is below; None where the floor held.
    """

    floor_s: float
    reached: float
    beaten_by: str | None = None

    @property
    def held(self) -> bool:
        """Whether the floor held: the measured median is not quicker."""
        return self.reached <= 1

    @property
    def share(self) -> str:
        """The share that was reached, as reports print it. A floor that was beaten has no share."""
        return f"{self.reached:.0%}" if self.held else "beaten"


class LatencyCell(_Record):
    """One cell of the grid.

    Attributes:
        ttft: seconds from submission until every request of the batch has its first token; a sample a round.
        itl: seconds between two tokens of a request: the decode steps of all rounds.
        tpot: seconds per output token after the first; the mean of a round's decode steps, a sample a round.
        e2e: seconds from submission until the last token; a sample a round.
        ttft_roof: the prefill's ceiling.
        tpot_roof: the decode step's ceiling, at the mean context.
        traces: the rounds' raw timestamps.
    """

    batch_size: int
    prompt_tokens: int
    output_tokens: int
    ttft: Distribution
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution
    ttft_roof: Roof | None
    tpot_roof: Roof | None
    traces: tuple[BatchTrace, ...]


class ThroughputRun(_Record):
    """One run of `pat-bench throughput`, at one concurrency.

    Attributes:
        concurrency: requests in flight.
        duration_s: time from the first submission to the last token.
        output_tokens_per_s: over the duration.
        requests_per_s: over the duration.
        ttft: seconds, of each request.
        tpot: seconds per output token after the first, of each request.
        roof_tokens_per_s: tokens a second that bytes and FLOPs of decode and prefill together allow.
        requests: raw timestamps.
    """

    concurrency: int
    duration_s: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft: Distribution
    tpot: Distribution | None
    roof_tokens_per_s: float | None
    requests: tuple[RequestTrace, ...]


class _Result(_Record):
    """The fields that both commands record.

    `peak_memory_bytes` is the process's peak on the host. `gpu_memory_bytes` is the most that the engine held on the
    GPU until it was ready; None without a GPU.
    """

    schema_version: int = SCHEMA_VERSION
    date: str
    duration_s: float
    machine: dict[str, str | int | list[str]]
    rates: MachineRates | None
    probes: tuple[MachineRates, ...] = ()
    model: str
    config_sha256: str
    shape: RecordedSizes
    parameters: int
    dtype: str
    start_s: float
    peak_memory_bytes: int
    gpu_memory_bytes: int | None = None


class LatencyResult(_Result):
    """The record of a complete `pat-bench latency`."""

    kind: Literal["latency"] = "latency"
    settings: LatencySettings
    cells: tuple[LatencyCell, ...]


class ThroughputResult(_Result):
    """A complete `pat-bench throughput`.

    Attributes:
        saturation: the run with the most tokens a second; None where saturation was not looked for or not reached.
    """

    kind: Literal["throughput"] = "throughput"
    settings: ThroughputSettings
    runs: tuple[ThroughputRun, ...]
    saturation: int | None

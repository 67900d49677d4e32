"""The record of `pat-bench plan`: the question, the measurements behind the answer, and the answer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from pat_serve.server.bench.latency.result import Distribution
from pat_serve.server.bench.planning.search import Outcome

SCHEMA_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlanSettings(_Record):
    """The traffic and the bounds of a plan.

    Attributes:
        rate: requests a second, Poisson.
        prompt_tokens: (tokens, weight) of prompts; unused where `lengths` names a file.
        output_tokens: likewise of answers, drawn independently.
        lengths: file of requests' lengths, drawn with replacement; None for none.
        slo: seconds that a good request takes at most: ttft, tpot, e2e.
        percentile: number of a hundred requests that must meet all bounds, in every simulation.
        dispatch: a request goes to the engine with the fewest requests, or to each engine in turn.
        max_batch: requests that an engine holds at once; None is the largest measured batch.
        max_step_tokens: prompt tokens of one step.
        kv_cache_gib: of each engine; None leaves the batch as the only bound.
        memory_gib: of each engine's weights and KV cache together, instead of `kv_cache_gib`.
        overhead_s: seconds that a server in front adds to the first token; measured engines have none.
        devices_per_engine: GPUs, or machines, that one engine spans: its tensor parallel degree times the pipeline's.
        price_per_hour: price of one such device; None leaves costs out.
        max_replicas: the most engines that are tried.
        requests: requests in each simulation.
        repeats: simulations, with seeds seed, seed + 1, ....
        seed: of arrivals and lengths.
    """

    rate: float
    prompt_tokens: tuple[tuple[int, float], ...] = ((128, 1.0),)
    output_tokens: tuple[tuple[int, float], ...] = ((64, 1.0),)
    lengths: str | None = None
    slo: dict[str, float]
    percentile: float = 90.0
    dispatch: Literal["least-loaded", "round-robin"] = "least-loaded"
    max_batch: int | None = None
    max_step_tokens: int = 2048
    kv_cache_gib: float | None = None
    memory_gib: float | None = None
    overhead_s: float = 0.0
    devices_per_engine: int = 1
    price_per_hour: float | None = None
    max_replicas: int = 256
    requests: int = 2000
    repeats: int = 3
    seed: int = 0


class PlanTrial(_Record):
    """One number of engines that was simulated, with the share of good requests on average and in the worst repeat."""

    replicas: int
    good_share: float
    worst_share: float


class ThroughputCheck(_Record):
    """A recorded `pat-bench throughput` run, simulated: a check of the step times, not of the traffic.

    Attributes:
        concurrency: requests in flight.
        measured_tokens_per_s: output tokens.
        simulated_tokens_per_s: output tokens.
    """

    concurrency: int
    measured_tokens_per_s: float
    simulated_tokens_per_s: float


class PlannedModel(_Record):
    """The engines of one model.

    Attributes:
        role: baseline or candidate.
        model: name of the model in its records.
        config_sha256: of its config.json.
        dtype: it was measured in.
        parameters: of the model.
        sources: files of measurements.
        max_batch: requests at once.
        kv_tokens: tokens that an engine's cache holds; None if unbounded.
        capacity_per_s: requests a second of one engine that is never idle.
        idle_share: share of the requests that meet the SLO on an engine of their own.
        outcome: the SLO is met, impossible with any number of engines, or beyond --max-replicas.
        reason: of the outcome, in words.
        replicas: engines needed; None without.
        load: share of the engines' capacity that the rate takes.
        good_share: share of good requests, on average over the repeats.
        ttft: seconds to the first token, at that number of engines.
        tpot: seconds per output token after the first.
        e2e: seconds to the last token.
        cost_per_hour: of all engines.
        cost_per_million_tokens: of output.
        trials: numbers of engines that were simulated.
        checks: recorded throughput, simulated.
        doubts: points of the grid that a quiet machine would not have given.
    """

    role: Literal["baseline", "candidate"]
    model: str
    config_sha256: str
    dtype: str
    parameters: int
    sources: tuple[str, ...]
    max_batch: int
    kv_tokens: int | None
    capacity_per_s: float
    idle_share: float
    outcome: Outcome
    reason: str
    replicas: int | None
    load: float | None
    good_share: float | None
    ttft: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    cost_per_hour: float | None
    cost_per_million_tokens: float | None
    trials: tuple[PlanTrial, ...]
    checks: tuple[ThroughputCheck, ...]
    doubts: tuple[str, ...]


class PlanResult(_Record):
    """A complete `pat-bench plan`. `machine` is the machine that was measured on; the plan counts such machines."""

    kind: Literal["plan"] = "plan"
    schema_version: int = SCHEMA_VERSION
    date: str
    machine: dict[str, str | int | list[str]]
    unit: Literal["machine", "GPU"]
    settings: PlanSettings
    models: tuple[PlannedModel, ...]

    @property
    def exit_code(self) -> int:
        """0 if every model meets the SLO, 1 if one cannot, 3 where the data do not say.

        The data do not say where a model might meet the SLO with more engines than were tried, or was measured on a
        disturbed machine.
        """
        outcomes = {model.outcome for model in self.models}
        if Outcome.IMPOSSIBLE in outcomes:
            return 1
        return 3 if Outcome.BEYOND in outcomes or any(model.doubts for model in self.models) else 0

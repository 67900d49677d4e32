"""The record of a speed-up check: its settings, every timestamp, and the figures that follow. Written as JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from pat_serve.server.analysis.capacity import Capacity
from pat_serve.server.analysis.noise import NoiseReport
from pat_serve.server.analysis.statistics import PairedRatio, Summary
from pat_serve.server.analysis.trace import BatchTrace
from pat_serve.server.analysis.verdict import Verdict
from pat_serve.server.bench.latency.result import Roof
from pat_serve.server.bench.recorded_sizes import RecordedSizes
from pat_serve.server.bench.speedup.depth_result import Extrapolated
from pat_serve.server.bench.speedup.grid import Regime
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.engine.workers.probe import MachineRates

# 2: several batch sizes, fixed memory, noise, capacity, what would make an inconclusive result conclusive.
# 3: a margin beside the claim, and the strict reading beside every verdict. Fields that came later have defaults.
SCHEMA_VERSION = 3


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Round(_Record):
    """One pair: the same prompts for both models, which take turns.

    Attributes:
        first: the model that began; the order alternates, so that a drift of the machine favours neither.
        prompts_sha256: digest of the token ids that were sent to the baseline; with fixed memory the candidate gets
            these and more.
        baseline: its raw timestamps.
        candidate: its raw timestamps.
        other_cpu_share: share of the machine's CPU time that went to neither engine meanwhile.
        waiting_engine_cpu_share: share of one core that the waiting engine used.
    """

    first: Literal["baseline", "candidate"]
    prompts_sha256: str
    baseline: BatchTrace
    candidate: BatchTrace
    other_cpu_share: float
    waiting_engine_cpu_share: float


class WarmUp(_Record):
    """Runs before the first round, which no verdict uses.

    Attributes:
        traces: their raw timestamps.
        stationary: the last two of them agreed.
    """

    traces: tuple[BatchTrace, ...]
    stationary: bool


class ModelRecord(_Record):
    """One of the two models and its engine.

    Attributes:
        name: as the user gave it.
        config_sha256: digest of its config.json, keys sorted, cut as measured.
        shape: its sizes, cut as measured.
        parameters: number of parameters, cut as measured.
        start_s: time from starting the engine until it was ready.
        peak_memory_bytes: peak of the engine's process on the host over its whole life, without a GPU's memory.
        gpu_memory_bytes: the most that the engine held on the GPU until it was ready; None without a GPU.
        warm_up: its runs before the first round.
        batch_size: requests at once, the most that it was given.
        capacity: requests that would fit into the memory that the baseline takes; None where nobody counted.
    """

    name: str
    config_sha256: str
    shape: RecordedSizes
    parameters: int
    start_s: float
    peak_memory_bytes: int
    warm_up: WarmUp
    batch_size: int = 1
    capacity: Capacity | None = None
    gpu_memory_bytes: int | None = None


class RegimeResult(_Record):
    """The figures and the verdict of one phase.

    Attributes:
        regime: the phase.
        batch_size: requests at once.
        prompt_tokens: of each request, where the check has a grid; None where all have the settings' length.
        claimed: the claim names it; else it is shown, and does not count for the check's verdict.
        candidate_batch_size: the candidate's requests at once, which differ with fixed memory.
        context_tokens: prompt length for prefill; mean tokens in a request's KV cache for decode.
        baseline: seconds: time to the batch's first tokens (prefill), time per output token (decode), over rounds; with
            fixed memory these over the batch size.
        candidate: the same.
        ratio: paired ratios, baseline / candidate.
        ceiling: the largest ratio that counting FLOPs (prefill) or bytes (decode) allows.
        of_ceiling: median ratio / ceiling.
        baseline_noise: relative median absolute deviation over rounds.
        candidate_noise: the candidate's relative median absolute deviation.
        noise: the disturbances of the rounds.
        rounds_needed: rounds in all that would probably give a verdict; None where no sensible number would.
        verdict: on the claim with its margin.
        strict_verdict: on the claim without it.
        reason: of the verdict.
        baseline_roof: the least seconds that its bytes and FLOPs take on the probed machine; None without a probe.
        candidate_roof: the same.
    """

    regime: Regime
    batch_size: int
    candidate_batch_size: int
    context_tokens: float
    baseline: Summary
    candidate: Summary
    ratio: PairedRatio
    ceiling: float
    of_ceiling: float
    baseline_noise: float
    candidate_noise: float
    noise: NoiseReport
    rounds_needed: int | None
    verdict: Verdict
    strict_verdict: Verdict
    reason: str
    baseline_roof: Roof | None = None
    candidate_roof: Roof | None = None
    prompt_tokens: int | None = None
    claimed: bool = True

    @property
    def name(self) -> str:
        """The name that tells this result from the check's other results: the phase, and the batch or both batches."""
        return f"{self.regime.value}, {'batch ' if self.prompt_tokens is None else ''}{self.batches}"

    @property
    def batches(self) -> str:
        """The batch size, with fixed memory both, and in a grid with the length of the prompts: 8x1024."""
        if self.prompt_tokens is not None:
            return f"{self.batch_size}x{self.prompt_tokens}"
        same = self.candidate_batch_size == self.batch_size
        return str(self.batch_size) if same else f"{self.batch_size}/{self.candidate_batch_size}"


class DepthMeasurement(_Record):
    """The measurements with both models cut to so many layers."""

    layers: int
    baseline: ModelRecord
    candidate: ModelRecord
    regimes: tuple[RegimeResult, ...]
    rounds: tuple[Round, ...]
    stopped: str


class SpeedupResult(_Record):
    """A complete check. `verdict` and `reason` sum up the regimes, or judge the average where the claim is about it.

    Attributes:
        strict_verdict: the same without the claim's margin.
        average: geometric mean over the batch sizes of each round's prefill ratios, with the interval of its median;
            None for a single batch size.
        stopped: the reason for which no more rounds were made.
        advice: steps that would make an inconclusive result conclusive; empty otherwise.
        rates: the best of the probes; None without one.
        probes: of the machine, by each engine before and after its rounds, in that order; shallower depths first.
        extrapolated: for the models' own depths, where several depths were measured; the verdict is then on these.
        shallower: the other measured depths; `baseline`, `candidate`, `regimes` and `rounds` are of the deepest.
        whole_capacities: of baseline and candidate at their own depths, where several depths were measured. A cut of
            layers shows here alone.
    """

    kind: Literal["speedup"] = "speedup"
    schema_version: int = SCHEMA_VERSION
    date: str
    duration_s: float
    machine: dict[str, str | int | list[str]]
    dtype: str
    settings: SpeedupSettings
    baseline: ModelRecord
    candidate: ModelRecord
    regimes: tuple[RegimeResult, ...]
    average: PairedRatio | None
    stopped: str
    verdict: Verdict
    strict_verdict: Verdict
    reason: str
    advice: tuple[str, ...]
    rounds: tuple[Round, ...]
    rates: MachineRates | None = None
    probes: tuple[MachineRates, ...] = ()
    extrapolated: tuple[Extrapolated, ...] = ()
    shallower: tuple[DepthMeasurement, ...] = ()
    whole_capacities: tuple[Capacity, ...] = ()

    @property
    def depths(self) -> tuple[DepthMeasurement, ...]:
        """All measured depths, the shallowest first."""
        deepest = DepthMeasurement(
            layers=self.baseline.shape.layers,
            baseline=self.baseline,
            candidate=self.candidate,
            regimes=self.regimes,
            rounds=self.rounds,
            stopped=self.stopped,
        )
        return (*self.shallower, deepest)

    @model_validator(mode="before")
    @classmethod
    def _read_version_2(cls, value: Any) -> Any:
        """Read a record of version 2, which was judged strictly: its margin is 0, its verdicts are the strict ones."""
        if not (isinstance(value, dict) and value.get("schema_version") == 2):
            return value
        try:
            regimes = [{**one, "strict_verdict": one["verdict"]} for one in value["regimes"]]
            margin = {"settings": {**value["settings"], "margin": 0.0}}
            return {**value, **margin, "regimes": regimes, "strict_verdict": value["verdict"]}
        except (KeyError, TypeError):
            return value  # a broken one, which the fields' own checks name

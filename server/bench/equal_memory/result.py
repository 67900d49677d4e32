"""The record of `pat-bench equal-memory`: settings, every run of the load, and the verdict. Pure maths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pat_serve.server.analysis.capacity import Capacity
from pat_serve.server.analysis.noise import noise_report
from pat_serve.server.analysis.statistics import PairedRatio, paired_ratio, percentile
from pat_serve.server.analysis.verdict import (
    DEFAULT_MARGIN,
    MAX_OTHER_CPU_SHARE,
    Claim,
    Judgement,
    Surroundings,
    Verdict,
    judge,
)
from pat_serve.server.bench.load.result import LoadRun
from pat_serve.shapes.sizes import ModelSizes

SCHEMA_VERSION = 1
Role = Literal["baseline", "candidate"]
ROLES: tuple[Role, Role] = ("baseline", "candidate")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EqualMemorySettings(_Record):
    """The load, the memory and the claim.

    Attributes:
        claim: times as many good requests a second as the baseline serves in the same memory.
        margin: share of the claim by which an interval may miss it and still meet it.
        memory_gib: for weights and KV cache of each model; None is what the baseline and `requests` of its requests
            take.
        requests: of the baseline that are to fit, where no memory is given.
        prompt_tokens: of each request.
        output_tokens: of each request.
        rates: requests a second, one run each; the best of them is a model's goodput.
        seconds: of each run.
        slo: seconds that a good request takes at most: ttft, tpot, e2e.
        rounds: pairs of series of runs.
        dtype: of what is not quantised; "auto" lets the machine decide.
        seed: of prompts, arrivals and bootstrap.
    """

    claim: float = 1.2
    margin: float = DEFAULT_MARGIN
    memory_gib: float | None = None
    requests: int = 8
    prompt_tokens: int = 448
    output_tokens: int = 64
    rates: tuple[float, ...] = (1.0,)
    seconds: float = 20.0
    slo: dict[str, float]
    rounds: int = 5
    dtype: str = "auto"
    seed: int = 0

    @property
    def claimed(self) -> Claim:
        """The claim with its margin."""
        return Claim(ratio=self.claim, margin=self.margin)


class MemoryModel(_Record):
    """One of the two models and its server.

    Attributes:
        name: as the user gave it.
        config_sha256: digest of its config.json, keys sorted.
        shape: its sizes.
        capacity: its weights, and the requests whose KV cache fits beside them.
        kv_cache_bytes: given to the server.
        ready_s: time from starting the server until it was ready.
        peak_memory_bytes: of all processes of the server, over the whole load.
    """

    name: str
    config_sha256: str
    shape: ModelSizes
    capacity: Capacity
    kv_cache_bytes: int
    ready_s: float
    peak_memory_bytes: int


class MemoryRound(_Record):
    """One series of runs for each model, the same prompts and arrivals for both.

    Attributes:
        first: the model that began.
        baseline: its runs, one for each rate.
        candidate: its runs.
        other_cpu_share: share of the machine's CPU time that went to neither server nor client.
    """

    first: Role
    baseline: tuple[LoadRun, ...]
    candidate: tuple[LoadRun, ...]
    other_cpu_share: float

    def runs(self, role: Role) -> tuple[LoadRun, ...]:
        """The runs of one model."""
        return self.baseline if role == "baseline" else self.candidate

    def goodput_per_s(self, role: Role) -> float:
        """The most good requests a second of all rates."""
        return max(run.goodput_per_s or 0.0 for run in self.runs(role))

    def tokens_per_s(self, role: Role) -> float:
        """The most output tokens a second of all rates."""
        return max(run.output_tokens_per_s for run in self.runs(role))


class EqualMemoryResult(_Record):
    """A complete comparison.

    Attributes:
        goodput_ratio: the candidate's good requests a second over the baseline's; None where a model had none in a
            round.
        tokens_ratio: the candidate's output tokens a second over the baseline's, at the best rate of each.
    """

    kind: Literal["equal-memory"] = "equal-memory"
    schema_version: int = SCHEMA_VERSION
    date: str
    duration_s: float
    machine: dict[str, str | int | list[str]]
    guidellm: str
    dtype: str
    settings: EqualMemorySettings
    memory_bytes: int
    baseline: MemoryModel
    candidate: MemoryModel
    rounds: tuple[MemoryRound, ...]
    goodput_ratio: PairedRatio | None
    tokens_ratio: PairedRatio | None
    verdict: Verdict
    strict_verdict: Verdict
    reason: str

    def model(self, role: Role) -> MemoryModel:
        """One of the two models."""
        return self.baseline if role == "baseline" else self.candidate

    def goodput_per_s(self, role: Role) -> float:
        """Median over rounds of the most good requests a second."""
        return percentile([one.goodput_per_s(role) for one in self.rounds], 50)

    def tokens_per_s(self, role: Role) -> float:
        """Median over rounds of the most output tokens a second."""
        return percentile([one.tokens_per_s(role) for one in self.rounds], 50)

    def in_flight(self, role: Role) -> float:
        """The most requests in flight, as the mean of a run; those that wait for the server count too."""
        return max(run.concurrency for one in self.rounds for run in one.runs(role))


def ratio_of(baseline: Sequence[float], candidate: Sequence[float], *, seed: int) -> PairedRatio | None:
    """Paired ratios candidate / baseline of rates; None where a rate is zero, which has no ratio."""
    if min(*baseline, *candidate) <= 0:
        return None
    return paired_ratio([1 / rate for rate in baseline], [1 / rate for rate in candidate], seed=seed)


def conclude(rounds: Sequence[MemoryRound], settings: EqualMemorySettings) -> Judgement:
    """The verdict on the claim about goodput, with its reason.

    A candidate that serves good requests where the baseline serves none has no ratio, and the verdict is then
    inconclusive: the rates or the bounds were not made for both models.
    """
    late = sum(not run.kept_schedule for one in rounds for role in ROLES for run in one.runs(role))
    if late:
        return _inconclusive(f"the client was late in {late} runs: it was the bottleneck, and not a server")
    rates = {role: [one.goodput_per_s(role) for one in rounds] for role in ROLES}
    ratio = ratio_of(rates["baseline"], rates["candidate"], seed=settings.seed)
    if ratio is None:
        none = [f"{role} {sum(rate <= 0 for rate in rates[role])}" for role in ROLES]
        return _inconclusive(f"rounds without a good request: {', '.join(none)} of {len(rounds)}")
    noise = noise_report(
        [1 / rate for rate in rates["baseline"]],
        [1 / rate for rate in rates["candidate"]],
        [one.first == "baseline" for one in rounds],
    )
    others = percentile([one.other_cpu_share for one in rounds], 50)
    judgement = judge(
        claim=settings.claimed,
        low=ratio.low,
        high=ratio.high,
        rounds=len(rounds),
        spread=noise.spread,
        drift=noise.drift,
        # A server is warm when it is ready, and each model's first run is left out.
        surroundings=Surroundings(other_cpu_share=others, settled=True),
    )
    reason = f"good requests a second: {judgement.reason}"
    if 0.1 < others <= MAX_OTHER_CPU_SHARE:
        reason += f"; other processes took {others:.0%} of this machine's CPU time meanwhile"
    return Judgement(verdict=judgement.verdict, strict=judgement.strict, reason=reason)


def _inconclusive(reason: str) -> Judgement:
    return Judgement(verdict=Verdict.INCONCLUSIVE, strict=Verdict.INCONCLUSIVE, reason=reason)

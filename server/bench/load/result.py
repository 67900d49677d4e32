"""The record of `pat-bench load`: what was asked for, every request's timestamps, latencies and goodput. Pure maths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pat_serve.server.analysis.statistics import percentile
from pat_serve.server.bench.latency.result import Distribution, distribution

SCHEMA_VERSION = 1

SLO_NAMES = ("ttft", "tpot", "e2e")
# A client that sends one request of twenty this much later than its schedule was itself the bottleneck.
LATE_S = 0.2


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoadSettings(_Record):
    """The load that guidellm sends.

    Attributes:
        url: address of the server, without /v1.
        profile: how requests arrive.
        rates: requests a second, one run each; unused by a sweep, which finds its own.
        sweep_size: runs of a sweep: one request at a time, as many as possible, and rates between these.
        prompt_tokens: of each request.
        output_tokens: of each request, exactly where the server knows ignore_eos.
        seconds: of each run.
        slo: seconds that a good request takes at most: ttft, tpot, e2e.
        model: name by which the server knows the model; empty takes the first of the server's list.
        tokenizer: folder or hub id; empty takes the place that the server names for its model.
        seed: of prompts and arrivals.
    """

    url: str
    profile: Literal["constant", "poisson", "sweep"] = "poisson"
    rates: tuple[float, ...] = (1.0,)
    sweep_size: int = 5
    prompt_tokens: int = 64
    output_tokens: int = 16
    seconds: float = 20.0
    slo: dict[str, float] = {}
    model: str = ""
    tokenizer: str = ""
    seed: int = 0


class LoadRequest(_Record):
    """One request as the client saw it; seconds since the epoch.

    Attributes:
        targeted_s: when the schedule wanted it sent; None in runs without a schedule.
        sent_s: when it was sent.
        first_token_s: when its first token came; None if none did.
        last_token_s: when its last token came.
        output_tokens: tokens that came.
        outcome: completed, errored, or cut off by the end of the run.
    """

    targeted_s: float | None
    sent_s: float
    first_token_s: float | None
    last_token_s: float | None
    output_tokens: int
    outcome: Literal["completed", "errored", "cut_off"]

    @property
    def latencies_s(self) -> dict[str, float]:
        """ttft, tpot (of more than one token) and e2e of a completed request."""
        assert self.first_token_s is not None
        assert self.last_token_s is not None
        times = {"ttft": self.first_token_s - self.sent_s, "e2e": self.last_token_s - self.sent_s}
        if self.output_tokens > 1:
            times["tpot"] = (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)
        return times

    def good(self, slo: Mapping[str, float]) -> bool:
        """Whether the request completed within all bounds; a single token has no time between tokens."""
        return self.outcome == "completed" and all(self.latencies_s.get(name, 0.0) <= slo[name] for name in slo)


class LoadRun(_Record):
    """One run, at one rate.

    Attributes:
        name: strategy and rate, as guidellm names them.
        rate: requests a second that were wanted; None where no rate was.
        duration_s: seconds of the run.
        completed: requests that were answered.
        errored: requests that failed.
        cut_off: requests that the end of the run cut off; neither good nor bad, since nobody knows.
        requests_per_s: completed, over the duration.
        output_tokens_per_s: of completed requests.
        concurrency: mean number of requests in flight; a failed request counts until its last token.
        good_share: share of the completed and errored requests that kept the bounds; None without bounds.
        goodput_per_s: requests a second that kept the bounds; None without bounds.
        late_s: delay of the client behind its schedule, 95th percentile over requests.
        ttft: of completed requests; None without any.
        tpot: the same.
        e2e: the same.
        requests: raw timestamps.
    """

    name: str
    rate: float | None
    duration_s: float
    completed: int
    errored: int
    cut_off: int
    requests_per_s: float
    output_tokens_per_s: float
    concurrency: float
    good_share: float | None
    goodput_per_s: float | None
    late_s: float | None
    ttft: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    requests: tuple[LoadRequest, ...]

    @property
    def kept_schedule(self) -> bool:
        """Whether the client kept its schedule."""
        return self.late_s is None or self.late_s <= LATE_S


class LoadResult(_Record):
    """A complete `pat-bench load`. `machine` is the client's, which need not be the server's."""

    kind: Literal["load"] = "load"
    schema_version: int = SCHEMA_VERSION
    date: str
    duration_s: float
    machine: dict[str, str | int | list[str]]
    guidellm: str
    settings: LoadSettings
    model: str
    tokenizer: str
    runs: tuple[LoadRun, ...]


def load_run(
    requests: Sequence[LoadRequest], *, name: str, rate: float | None, duration_s: float, slo: Mapping[str, float]
) -> LoadRun:
    """Latencies and goodput of one run, from its raw timestamps.

    Args:
        requests: all of the run.
        name: for people.
        rate: requests a second that were wanted.
        duration_s: above 0.
        slo: bounds in seconds; may be empty.
    """
    completed = [one for one in requests if one.outcome == "completed"]
    errored = sum(one.outcome == "errored" for one in requests)
    times = [one.latencies_s for one in completed]

    def spread(kind: str) -> Distribution | None:
        samples = [one[kind] for one in times if kind in one]
        return distribution(samples) if samples else None

    good = sum(one.good(slo) for one in requests)
    judged = len(completed) + errored
    late_s = [max(0.0, one.sent_s - one.targeted_s) for one in requests if one.targeted_s is not None]
    return LoadRun(
        name=name,
        rate=rate,
        duration_s=duration_s,
        completed=len(completed),
        errored=errored,
        cut_off=len(requests) - judged,
        requests_per_s=len(completed) / duration_s,
        output_tokens_per_s=sum(one.output_tokens for one in completed) / duration_s,
        concurrency=_in_flight_s(requests, duration_s) / duration_s,
        good_share=good / judged if slo and judged else None,
        goodput_per_s=good / duration_s if slo else None,
        late_s=percentile(late_s, 95) if late_s else None,
        ttft=spread("ttft"),
        tpot=spread("tpot"),
        e2e=spread("e2e"),
        requests=tuple(requests),
    )


def _in_flight_s(requests: Sequence[LoadRequest], duration_s: float) -> float:
    """Seconds in flight, summed over requests. A request that the end of the run cut off counts until that end."""
    if not requests:
        return 0.0
    end_s = min(one.sent_s for one in requests) + duration_s
    total_s = 0.0
    for one in requests:
        until_s = end_s if one.outcome == "cut_off" else one.last_token_s
        total_s += max(0.0, (one.sent_s if until_s is None else until_s) - one.sent_s)
    return total_s


def read_guidellm(report: Mapping[str, Any], slo: Mapping[str, float]) -> tuple[LoadRun, ...]:
    """Read the runs of guidellm's JSON report, version 0.8: each request's raw timestamps, and none of the aggregates.

    Raises:
        KeyError: the report has another layout.
    """
    runs = []
    for benchmark in report["benchmarks"]:
        strategy = benchmark["config"]["strategy"]
        scheduled = strategy["type_"] in ("constant", "poisson")
        groups = (("completed", "successful"), ("errored", "errored"), ("cut_off", "incomplete"))
        requests = []
        for outcome, key in groups:
            for one in benchmark["requests"][key] or ():
                times = one["info"]["timings"]
                sent_s = times["request_start"]
                if sent_s is None:
                    continue  # still in the client's queue when the run ended
                came = times["first_token_iteration"] is not None and bool(one["output_tokens"])
                requests.append(
                    LoadRequest.model_validate(
                        {
                            "targeted_s": times["targeted_start"] if scheduled else None,
                            "sent_s": sent_s,
                            "first_token_s": times["first_token_iteration"],
                            "last_token_s": times["last_token_iteration"],
                            "output_tokens": one["output_tokens"] or 0,
                            "outcome": outcome if outcome != "completed" or came else "errored",
                        }
                    )
                )
        rate = strategy["rate"] if scheduled else None
        name = f"{strategy['type_']} {rate:g}/s" if rate is not None else strategy["type_"]
        runs.append(load_run(requests, name=name, rate=rate, duration_s=benchmark["duration"], slo=slo))
    return tuple(runs)

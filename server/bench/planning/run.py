"""`pat-bench plan` turns recorded measurements and a traffic into engines and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pat_serve.errors import UsageError, want
from pat_serve.files import strict_json
from pat_serve.files.text_files import read_lines
from pat_serve.machine.hardware import DTYPE_BYTES
from pat_serve.server.analysis.capacity import capacity
from pat_serve.server.bench.latency.result import Distribution, distribution
from pat_serve.server.bench.load.result import SLO_NAMES
from pat_serve.server.bench.planning.records import Measured, check_same_machine, read_measured
from pat_serve.server.bench.planning.result import PlannedModel, PlanResult, PlanSettings, PlanTrial, ThroughputCheck
from pat_serve.server.bench.planning.search import Found, Outcome, Traffic, find_replicas, quantities
from pat_serve.server.bench.planning.simulation import Engine, simulate_closed
from pat_serve.server.bench.planning.steps import StepTimes
from pat_serve.server.bench.planning.traffic import Arrival, Mix, crossed

# (stage, steps done, steps in all)
Progress = Callable[[str, int, int], None]
_SECONDS_PER_HOUR = 3600


class _Lengths(BaseModel):
    model_config = ConfigDict(extra="ignore")
    prompt_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=1)


def make_plan(
    baseline: Sequence[Path], candidate: Sequence[Path], settings: PlanSettings, *, progress: Progress
) -> PlanResult:
    """Count the engines that each model needs.

    Args:
        baseline: records of the dense model.
        candidate: records of the pruned one; may be empty.
        settings: the traffic, the SLO and an engine's bounds.
        progress: called with news as it goes.

    Raises:
        UsageError: settings that make no sense, records that do not fit each other, or traffic outside the measured
            range.
    """
    check_settings(settings)
    models = [read_measured(baseline, role="baseline")]
    if candidate:
        models.append(read_measured(candidate, role="candidate"))
        check_same_machine(*models)
    mix = read_mix(settings)
    # All refusals come before the first simulation.
    engines = [engine_of(model, mix, settings) for model in models]
    planned = [_plan_one(model, engine, mix, settings, progress) for model, engine in zip(models, engines, strict=True)]
    return PlanResult(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=models[0].machine,
        unit="machine" if models[0].machine.get("accelerator") == "none" else "GPU",
        settings=settings,
        models=tuple(planned),
    )


def check_settings(settings: PlanSettings) -> None:
    """Refuse settings that cannot be planned.

    Raises:
        UsageError: naming the flag.
    """
    want("--rate", 0 < settings.rate < float("inf"), "above 0", settings.rate, "Try --rate 5.")
    want("--slo", bool(settings.slo), "one bound at least", "none", "Try --slo ttft=0.5 --slo tpot=0.1.")
    for name, bound_s in settings.slo.items():
        want(f"--slo {name}", name in SLO_NAMES, ", ".join(SLO_NAMES), name, "Try --slo ttft=0.5.")
        want(f"--slo {name}", bound_s > 0, "seconds above 0", bound_s, f"Try --slo {name}=0.5.")
    want("--percentile", 0 < settings.percentile < 100, "between 0 and 100", settings.percentile, "Try 90.")
    want("--requests", settings.requests >= 100, "at least 100", settings.requests, "Try --requests 2000.")
    want("--repeats", settings.repeats >= 1, "at least 1", settings.repeats, "Try --repeats 3.")
    want("--max-replicas", settings.max_replicas >= 1, "at least 1", settings.max_replicas, "Try 256.")
    want("--max-step-tokens", settings.max_step_tokens >= 1, "at least 1", settings.max_step_tokens, "Try 2048.")
    want("--overhead", settings.overhead_s >= 0, "0 or more seconds", settings.overhead_s, "Try --overhead 0.005.")
    devices = settings.devices_per_engine
    want("--devices-per-engine", devices >= 1, "at least 1", devices, "Try --devices-per-engine 2.")
    price = settings.price_per_hour
    want("--price-per-hour", price is None or price >= 0, "0 or more", price, "Try --price-per-hour 2.5.")
    for flag, gib in (("--kv-cache-gib", settings.kv_cache_gib), ("--memory-gib", settings.memory_gib)):
        want(flag, gib is None or gib > 0, "above 0", gib, f"Try {flag} 4.")
    both = settings.kv_cache_gib is not None and settings.memory_gib is not None
    want("--memory-gib", not both, "it or --kv-cache-gib", "both", "Leave one out.")


def read_mix(settings: PlanSettings) -> Mix:
    """The kinds of requests, from the file of lengths if one is named.

    Raises:
        UsageError: a file that is not there, or a row without lengths.
    """
    if settings.lengths is None:
        return crossed(settings.prompt_tokens, settings.output_tokens)
    path, counts = Path(settings.lengths), dict[tuple[int, int], int]()
    try:
        lines = read_lines(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--lengths {path}", expected="a JSONL file", found=str(error), fix="Name a file that can be read."
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = _Lengths.model_validate(strict_json.parse(line))
            except (ValueError, ValidationError) as error:
                raise UsageError(
                    f"--lengths {path}, line {number}",
                    expected='a row like {"prompt_tokens": 128, "output_tokens": 32}, both at least 1',
                    found=repr(line[:60]),
                    fix="Correct the row.",
                ) from error
            key = (row.prompt_tokens, row.output_tokens)
            counts[key] = counts.get(key, 0) + 1
    if not counts:
        raise UsageError(f"--lengths {path}", expected="one row at least", found="none", fix="Add a row a request.")
    rows = sum(counts.values())
    return Mix(
        prompt_tokens=tuple(prompt for prompt, _ in counts),
        output_tokens=tuple(output for _, output in counts),
        weights=tuple(count / rows for count in counts.values()),
    )


def engine_of(model: Measured, mix: Mix, settings: PlanSettings) -> Engine:
    """One model's engine within the settings' bounds, checked against the traffic.

    Raises:
        UsageError: traffic or bounds outside the measured grid, or a request that no cache of this size holds.
    """
    times = StepTimes(model.cells, name=model.name)
    times.check(prompt_tokens=mix.prompt_range, longest=mix.longest, decodes=mix.decodes)
    batch = settings.max_batch or times.largest_batch
    if not 1 <= batch <= times.largest_batch:
        raise UsageError(
            "--max-batch",
            expected=f"1 to {times.largest_batch}, the largest batch that was measured of {model.name}",
            found=str(batch),
            fix=f"Measure with pat-bench latency --batch-size ...,{batch}; nothing is extrapolated.",
        )
    tokens = kv_tokens(model, settings)
    if tokens is not None and tokens < mix.longest:
        raise UsageError(
            "--memory-gib" if settings.memory_gib is not None else "--kv-cache-gib",
            expected=f"room for a request's {mix.longest} tokens beside what {model.name} takes",
            found=f"room for {max(0, tokens)}",
            fix="Give an engine more memory, or plan shorter requests.",
        )
    return Engine(times=times, max_batch=batch, max_step_tokens=settings.max_step_tokens, kv_tokens=tokens)


def kv_tokens(model: Measured, settings: PlanSettings) -> int | None:
    """Tokens that an engine's KV cache holds; None where nothing bounds it."""
    dtype_bytes = DTYPE_BYTES[model.dtype]
    memory_bytes = model.memory_bytes if settings.kv_cache_gib is None else None
    if settings.memory_gib is not None:
        memory_bytes = int(settings.memory_gib * 2**30)
    if memory_bytes is not None:
        # A request of one token is a token.
        return capacity(model.shape, memory_bytes=memory_bytes, tokens=1, dtype_bytes=dtype_bytes).requests
    if settings.kv_cache_gib is not None:
        return int(settings.kv_cache_gib * 2**30) // (dtype_bytes * model.shape.kv_values_per_token)
    return None


def _plan_one(model: Measured, engine: Engine, mix: Mix, settings: PlanSettings, progress: Progress) -> PlannedModel:
    overhead_s = settings.overhead_s
    traffic = Traffic(
        mix=mix,
        rate_per_s=settings.rate,
        # The server in front takes a part of the time that the SLO leaves to the engine.
        slo={name: bound_s - (0 if name == "tpot" else overhead_s) for name, bound_s in settings.slo.items()},
        share=settings.percentile / 100,
        requests=settings.requests,
        seeds=tuple(range(settings.seed, settings.seed + settings.repeats)),
        dispatch=settings.dispatch,
    )
    tried: list[int] = []

    def news(replicas: int) -> None:
        tried.append(replicas)
        progress(f"{model.name}: {replicas} engines", len(tried), len(tried) + 1)

    progress(f"{model.name}: capacity", 0, 1)
    found = find_replicas(engine, traffic, max_replicas=settings.max_replicas, progress=news)
    chosen = found.chosen
    replicas = chosen.replicas if chosen else None
    hourly = None
    if replicas and settings.price_per_hour is not None:
        hourly = replicas * settings.devices_per_engine * settings.price_per_hour
    tokens_per_hour = settings.rate * mix.mean_output_tokens * _SECONDS_PER_HOUR

    def times(name: str) -> Distribution | None:
        values = quantities(chosen.timings, name) if chosen else []
        added_s = 0.0 if name == "tpot" else overhead_s
        return distribution([value + added_s for value in values]) if values else None

    return PlannedModel(
        role=model.role,
        model=model.name,
        config_sha256=model.config_sha256,
        dtype=model.dtype,
        parameters=model.shape.parameters,
        sources=model.sources,
        max_batch=engine.max_batch,
        kv_tokens=engine.kv_tokens,
        capacity_per_s=found.capacity_per_s,
        idle_share=found.idle_share,
        outcome=found.outcome,
        reason=reason(found, settings),
        replicas=replicas,
        load=settings.rate / (replicas * found.capacity_per_s) if replicas else None,
        good_share=_mean(chosen.good_shares) if chosen else None,
        ttft=times("ttft"),
        tpot=times("tpot"),
        e2e=times("e2e"),
        cost_per_hour=hourly,
        cost_per_million_tokens=None if hourly is None else hourly / tokens_per_hour * 1e6,
        trials=tuple(
            PlanTrial(replicas=one.replicas, good_share=_mean(one.good_shares), worst_share=min(one.good_shares))
            for one in found.trials
        ),
        checks=tuple(check_throughput(model, settings)),
        doubts=tuple(engine.times.doubts()),
    )


def reason(found: Found, settings: PlanSettings) -> str:
    """The reason for an outcome, in words."""
    slo = " and ".join(f"{name} {bound_s:g} s" for name, bound_s in settings.slo.items())
    if found.outcome is Outcome.IMPOSSIBLE:
        return (
            f"no number of engines gives {slo} to {settings.percentile:g} % of requests: "
            f"only {found.idle_share:.0%} keep it on an engine of their own"
        )
    if found.outcome is Outcome.BEYOND:
        worst = (
            f"{min(found.trials[-1].good_shares):.1%} of requests keep it" if found.trials else "the rate exceeds them"
        )
        return f"{settings.max_replicas} engines, the most that were tried, are too few for {slo}: {worst}"
    assert found.chosen is not None
    return f"{min(found.chosen.good_shares):.1%} of requests or more keep {slo}, in every repeat"


def check_throughput(model: Measured, settings: PlanSettings) -> list[ThroughputCheck]:
    """Simulate the recorded throughput runs that the grid covers, with the records' own lengths."""
    checks = []
    for record in model.throughputs:
        prompt, output = record.settings.prompt_tokens, record.settings.output_tokens
        times = StepTimes(model.cells, name=model.name)
        try:
            times.check(prompt_tokens=(prompt, prompt), longest=prompt + output, decodes=output > 1)
        except UsageError:
            # These runs are not the planned traffic, so a run that cannot be checked is left unchecked.
            continue
        for run in record.runs:
            if run.concurrency <= times.largest_batch:
                engine = Engine(
                    times=times,
                    max_batch=times.largest_batch,
                    max_step_tokens=settings.max_step_tokens,
                    kv_tokens=None,
                )
                kinds = [Arrival(at_s=0.0, prompt_tokens=prompt, output_tokens=output)] * len(run.requests)
                served = simulate_closed(kinds, engine, concurrency=run.concurrency)
                checks.append(
                    ThroughputCheck(
                        concurrency=run.concurrency,
                        measured_tokens_per_s=run.output_tokens_per_s,
                        simulated_tokens_per_s=len(kinds) * output / max(one.last_token_s for one in served),
                    )
                )
    return checks


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

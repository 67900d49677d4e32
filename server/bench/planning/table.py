"""A plan as a table for people."""

from __future__ import annotations

from rich.table import Table

from pat_serve.server.bench.latency.result import Distribution
from pat_serve.server.bench.latency.table import milliseconds, wide_console
from pat_serve.server.bench.planning.result import PlannedModel, PlanResult


def print_plan(result: PlanResult) -> None:
    """Print a column for each model, and the saving by pruning, on stdout."""
    console, settings = wide_console(), result.settings
    lengths = settings.lengths or f"{_spelt(settings.prompt_tokens)} + {_spelt(settings.output_tokens)} tokens"
    slo = ", ".join(f"{name} {bound_s:g} s" for name, bound_s in settings.slo.items())
    devices = settings.devices_per_engine
    spans = f"a {result.unit}" if devices == 1 else f"on {devices} {result.unit}s"
    where = result.machine["cpu_model"] if result.unit == "machine" else result.machine["accelerator"]
    console.print(
        f"{settings.rate:g} requests/s (Poisson), {lengths}, {settings.dispatch}; {settings.percentile:g} % of "
        f"requests within {slo}\nmeasured on {where}, {result.machine['cpu_cores']} cores; one engine {spans}; "
        f"{settings.repeats} x {settings.requests} simulated requests, seed {settings.seed}\n",
        markup=False,
        soft_wrap=True,
    )
    table = Table("", *(f"{model.role}: {model.model}" for model in result.models))
    counts = {f"{result.unit}s": devices} if devices == 1 else {"engines": 1, f"{result.unit}s": devices}
    rows = [
        *(
            (name, [str(model.replicas * each) if model.replicas else "none" for model in result.models])
            for name, each in counts.items()
        ),
        ("one saturates at, requests/s", [f"{model.capacity_per_s:.3g}" for model in result.models]),
        ("load of all", [_share(model.load) for model in result.models]),
        ("good requests", [_share(model.good_share) for model in result.models]),
        ("TTFT p50, p90, p99 ms", [_times(model.ttft) for model in result.models]),
        ("TPOT p50, p90, p99 ms", [_times(model.tpot) for model in result.models]),
        ("E2E p50, p90, p99 ms", [_times(model.e2e) for model in result.models]),
        ("batch, KV tokens at most", [f"{model.max_batch}, {model.kv_tokens or 'any'}" for model in result.models]),
    ]
    if settings.price_per_hour is not None:
        rows += [
            ("cost an hour", [_money(model.cost_per_hour) for model in result.models]),
            ("cost of 1 M output tokens", [_money(model.cost_per_million_tokens) for model in result.models]),
        ]
    for name, cells in rows:
        table.add_row(name, *cells)
    console.print(table)
    for model in result.models:
        console.print(f"{model.role}: {model.outcome.value}, {model.reason}", markup=False, soft_wrap=True)
        for check in model.checks:
            console.print(
                f"{model.role}: {check.concurrency} in flight gave {check.measured_tokens_per_s:.4g} tokens/s, "
                f"simulated {check.simulated_tokens_per_s:.4g} "
                f"({check.simulated_tokens_per_s / check.measured_tokens_per_s - 1:+.0%})",
                markup=False,
                soft_wrap=True,
            )
        for doubt in model.doubts:
            console.print(
                f"{model.role}: {doubt}: the machine was disturbed, so this plan is not to be relied on; measure again",
                markup=False,
                soft_wrap=True,
            )
    saved = saving(result.models)
    if saved:
        console.print(saved, markup=False)


def saving(models: tuple[PlannedModel, ...]) -> str:
    """The saving by the candidate, in words; empty where there is nothing to compare."""
    if len(models) < 2 or models[0].replicas is None or models[1].replicas is None:
        return ""
    baseline, candidate = models[0].replicas, models[1].replicas
    return (
        f"{candidate} instead of {baseline} ({candidate / baseline - 1:+.0%}); one engine carries "
        f"{models[1].capacity_per_s / models[0].capacity_per_s:.3f}x the requests"
    )


def _spelt(kinds: tuple[tuple[int, float], ...]) -> str:
    return str(kinds[0][0]) if len(kinds) == 1 else ",".join(f"{tokens}:{weight:g}" for tokens, weight in kinds)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _times(times: Distribution | None) -> str:
    return "" if times is None else ", ".join(milliseconds(value) for value in (times.p50, times.p90, times.p99))


def _money(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"

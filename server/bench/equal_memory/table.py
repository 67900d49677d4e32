"""A comparison at equal memory as a table for people."""

from __future__ import annotations

from rich.table import Table

from pat_serve.server.analysis.statistics import PairedRatio
from pat_serve.server.bench.equal_memory.result import ROLES, EqualMemoryResult
from pat_serve.server.bench.latency.table import wide_console


def print_equal_memory(result: EqualMemoryResult) -> None:
    """Print both models' shares of the memory, what they served, and the verdict, on stdout."""
    console, settings = wide_console(), result.settings
    slo = ", ".join(f"{name} {bound_s:g} s" for name, bound_s in settings.slo.items())
    rates = ", ".join(f"{rate:g}" for rate in settings.rates)
    console.print(
        f"{result.memory_bytes / 2**30:.3g} GiB for weights and KV cache of each; requests of "
        f"{settings.prompt_tokens} + {settings.output_tokens} tokens at {rates} a second, Poisson, "
        f"{settings.seconds:g} s a run, {settings.rounds} rounds; good is {slo}\n",
        markup=False,
        soft_wrap=True,
    )
    table = Table(
        "model", "weights MiB", "KV cache MiB", "requests that fit", "in flight", "tokens/s", "good requests/s",
        "ready s", "peak GiB",
    )  # fmt: skip
    for role in ROLES:
        model = result.model(role)
        table.add_row(
            model.name,
            f"{model.capacity.weight_bytes / 2**20:.1f}",
            f"{model.kv_cache_bytes / 2**20:.1f}",
            str(model.capacity.requests),
            f"{result.in_flight(role):.3g}",
            f"{result.tokens_per_s(role):.4g}",
            f"{result.goodput_per_s(role):.3g}",
            f"{model.ready_s:.1f}",
            f"{model.peak_memory_bytes / 2**30:.2f}",
        )
    console.print(table)
    for name, ratio in (("tokens/s", result.tokens_ratio), ("good requests/s", result.goodput_ratio)):
        console.print(f"{name}: {_told(ratio)}", markup=False)
    console.print(f"\n{settings.claimed}: {result.verdict.value.upper()}", markup=False)
    console.print(result.reason, markup=False, soft_wrap=True)


def _told(ratio: PairedRatio | None) -> str:
    if ratio is None:
        return "no ratio, since a model served none in a round"
    return f"{ratio.median:.3f} times the baseline's [{ratio.low:.3f}, {ratio.high:.3f}]"

"""Latency and throughput results as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pat_serve.server.bench.latency.result import Distribution, LatencyResult, Roof, ThroughputResult

_PLAIN_WIDTH = 120


def wide_console() -> Console:
    """A console on stdout that is wide enough where stdout has no width of its own: a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def milliseconds(value_s: float) -> str:
    """A duration with three significant digits."""
    value = value_s * 1000
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def peaks(host_bytes: int, gpu_bytes: int | None) -> str:
    """The memory that an engine took on the host, and on the GPU if there is one."""
    gpu = "" if gpu_bytes is None else f", on the GPU {gpu_bytes / 2**30:.2f} GiB"
    return f"process peak {host_bytes / 2**30:.2f} GiB (host){gpu}"


def share_of(tokens_per_s: float, roof: float) -> str:
    """The share of a ceiling that a rate reaches. A ceiling that was beaten has no share."""
    return f"{tokens_per_s / roof:.0%}" if tokens_per_s <= roof else "beaten"


def beaten_lines(result: LatencyResult) -> list[str]:
    """The fault of each floor that a cell is quicker than."""
    return [
        f"no floor: {name} of {cell.batch_size} x {cell.prompt_tokens} + {cell.output_tokens}: {roof.beaten_by}"
        for cell in result.cells
        for name, roof in (("TTFT", cell.ttft_roof), ("TPOT", cell.tpot_roof))
        if roof is not None and roof.beaten_by is not None
    ]


def print_latency(result: LatencyResult) -> None:
    """Print the grid on stdout, a line for each cell and figure."""
    console = wide_console()
    _print_head(console, result)
    table = Table("batch", "prompt", "output", "ms", "p50", "p90", "p99", "p99.9", "floor", "reached", "samples")
    for cell in result.cells:
        lines: list[tuple[str, Distribution | None, Roof | None]] = [
            ("TTFT", cell.ttft, cell.ttft_roof),
            ("TPOT", cell.tpot, cell.tpot_roof),
            ("ITL", cell.itl, None),
            ("E2E", cell.e2e, None),
        ]
        for index, (name, times, roof) in enumerate(lines):
            if times is None:
                continue
            where = (cell.batch_size, cell.prompt_tokens, cell.output_tokens) if index == 0 else ("", "", "")
            table.add_row(
                *map(str, where),
                name,
                *(milliseconds(value) for value in (times.p50, times.p90, times.p99, times.p99_9)),
                milliseconds(roof.floor_s) if roof else "",
                roof.share if roof else "",
                str(times.count),
            )
        table.add_section()
    console.print(table)
    for told in beaten_lines(result):
        console.print(told, markup=False, soft_wrap=True)


def print_throughput(result: ThroughputResult) -> None:
    """Print a line for each concurrency on stdout."""
    console = wide_console()
    _print_head(console, result)
    table = Table(
        "in flight", "tokens/s", "requests/s", "ceiling", "reached", "TTFT p50", "p99", "TPOT p50", "p99", "ms"
    )
    for run in result.runs:
        roof = run.roof_tokens_per_s
        table.add_row(
            str(run.concurrency),
            f"{run.output_tokens_per_s:.4g}",
            f"{run.requests_per_s:.3g}",
            f"{roof:.4g}" if roof else "",
            share_of(run.output_tokens_per_s, roof) if roof else "",
            milliseconds(run.ttft.p50),
            milliseconds(run.ttft.p99),
            *((milliseconds(run.tpot.p50), milliseconds(run.tpot.p99)) if run.tpot else ("", "")),
        )
    console.print(table)
    if result.saturation is not None:
        console.print(
            f"saturated: {result.saturation} in flight give the most, the last doubling less than a twentieth"
        )
    elif result.settings.saturate:
        console.print(f"not saturated by {result.runs[-1].concurrency} in flight; --max-concurrency is the bound")


def _print_head(console: Console, result: LatencyResult | ThroughputResult) -> None:
    shape, machine = result.shape, result.machine
    weights = "random weights" if result.settings.load_format == "dummy" else "real weights"
    peak = peaks(result.peak_memory_bytes, result.gpu_memory_bytes)
    console.print(
        f"{result.model}: {result.parameters / 1e6:,.1f} M parameters, hidden {shape.hidden}, "
        f"{shape.layers} layers, {result.dtype}, {weights}, {peak}",
        markup=False,
        soft_wrap=True,
    )
    where = machine["cpu_model"] if machine["accelerator"] == "none" else machine["accelerator"]
    rates = result.rates
    roofs = f", reads {rates.bytes_per_s / 1e9:.3g} GB/s, {rates.flops_per_s / 1e9:.4g} GFLOP/s" if rates else ""
    console.print(f"vLLM {machine['vllm']}, {where}, {machine['cpu_cores']} cores{roofs}\n", markup=False)

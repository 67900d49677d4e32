"""A speed-up result as a table for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pat_serve.server.analysis.statistics import percentile
from pat_serve.server.analysis.verdict import Verdict
from pat_serve.server.bench.latency.table import milliseconds, peaks
from pat_serve.server.bench.speedup.depth_result import Extrapolated
from pat_serve.server.bench.speedup.result import DepthMeasurement, ModelRecord, RegimeResult, SpeedupResult

_COLOURS = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.INCONCLUSIVE: "yellow"}
# The width of the table where stdout is a file or a pipe, which has none of its own.
_PLAIN_WIDTH = 150


def print_result(result: SpeedupResult) -> None:
    """Print models, one line for each regime, and the verdict with its reason on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PLAIN_WIDTH)
    settings = result.settings
    console.print(f"baseline   {_model(result.baseline)}", markup=False)
    console.print(f"candidate  {_model(result.candidate)}", markup=False)
    machine = f"{result.machine['cpu_model']}, {result.machine['cpu_cores']} cores"
    if result.machine["accelerator"] != "none":
        machine = f"{result.machine['accelerator']}, {machine}"
    kind = "random weights" if settings.load_format == "dummy" else "real weights"
    rounds = len(result.rounds) // len(settings.cells)
    console.print(f"{result.dtype}, {kind}, {rounds} paired rounds, vLLM {result.machine['vllm']}, {machine}\n")
    table = Table(*_COLUMNS)
    for extrapolated in result.extrapolated:
        table.add_row(*_whole_row(extrapolated))
    for depth in result.depths:
        for regime in depth.regimes:
            table.add_row(*_row(regime, depth.layers))
    console.print(table)
    for line in depth_lines(result):
        console.print(line, markup=False, soft_wrap=True)
    if result.average is not None:
        average = result.average
        interval = f"{average.median:.3f} \\[{average.low:.3f}, {average.high:.3f}]"
        console.print(f"average over batches (prefill, geometric mean)  {interval}")
    for line in note_lines(result):
        console.print(line, markup=False, soft_wrap=True)
    for line in memory_lines(result):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"rounds  {result.stopped}\n", markup=False, soft_wrap=True)
    if result.extrapolated:
        console.print(WHOLE_MODELS, markup=False, soft_wrap=True)
    colour = _COLOURS[result.verdict]
    if settings.named:
        console.print(UNCLAIMED, markup=False, soft_wrap=True)
    console.print(f"{claim_line(result)}: [bold {colour}]{result.verdict.value.upper()}[/]{_strictly(result)}")
    console.print(result.reason, markup=False, soft_wrap=True)
    for line in result.advice:
        console.print(f"to decide: {line}", markup=False, soft_wrap=True)


def depth_lines(result: SpeedupResult) -> list[str]:
    """The seconds of each model's step beside its layers, and the seconds of a layer; no line for a single depth."""
    return [
        f"depth   {one.regime.value}, batch {one.batches}, from {', '.join(map(str, one.layers_measured))} layers: "
        + "; ".join(
            f"{label} {_milli(fit.fixed_s, fit.fixed_low_s, fit.fixed_high_s)} fixed and "
            f"{_milli(fit.layer_s, fit.layer_low_s, fit.layer_high_s)} a layer, {milliseconds(fit.total_s)} ms whole"
            for label, fit in (("baseline", one.baseline), ("candidate", one.candidate))
        )
        for one in result.extrapolated
    ]


def _milli(value_s: float, low_s: float, high_s: float) -> str:
    return f"{1e3 * value_s:.4g} [{1e3 * low_s:.4g}, {1e3 * high_s:.4g}] ms"


def note_lines(result: SpeedupResult) -> list[str]:
    """Noise and floors of each depth, and the surroundings of the rounds."""
    depths = result.depths
    several = len(depths) > 1

    def at(depth: DepthMeasurement, line: str) -> str:
        return f"{line} ({depth.layers} layers)" if several else line

    return [
        *(at(depth, noise_line(one)) for depth in depths for one in depth.regimes),
        *(at(depth, line) for depth in depths for one in depth.regimes for line in floor_lines(one)),
        *(at(depth, around_line(depth)) for depth in depths),
    ]


def noise_line(result: RegimeResult) -> str:
    """The noise report of a regime in a line."""
    noise = result.noise
    order = "" if noise.order_effect is None else f", order {noise.order_effect:+.1%}"
    return (
        f"noise   {result.name}: spread {noise.baseline_spread:.1%} and "
        f"{noise.candidate_spread:.1%}, of the ratios {noise.ratio_spread:.1%}, drift {noise.drift:+.1%}, "
        f"{noise.stalls} stalls{order}"
    )


def floor_lines(result: RegimeResult) -> list[str]:
    """The least seconds of both models' counted work on the probed machine; no line without a probe."""
    told = [
        f"{label} {milliseconds(roof.floor_s)} ms, {roof.share} reached"
        if roof.held
        else f"{label} has none: {roof.beaten_by or 'it was quicker than the probe'}"
        for label, roof in (("baseline", result.baseline_roof), ("candidate", result.candidate_roof))
        if roof is not None
    ]
    return [f"floor   {result.name}: {'; '.join(told)}"] if told else []


def around_line(result: SpeedupResult | DepthMeasurement) -> str:
    """The surroundings of the rounds: whether the warm-ups settled, and the share of other processes."""
    warmed = []
    for label, model in (("baseline", result.baseline), ("candidate", result.candidate)):
        runs = len(model.warm_up.traces)
        warmed.append(f"{label} {'settled after' if model.warm_up.stationary else 'NOT settled within'} {runs} runs")
    others = percentile([one.other_cpu_share for one in result.rounds], 50)
    return f"warm-up {', '.join(warmed)}; other processes took {others:.0%} of the CPU time during the rounds"


def memory_lines(result: SpeedupResult) -> list[str]:
    """Memory of both models, and the requests that the same memory holds of each."""
    lines = []
    for label, model in (("baseline", result.baseline), ("candidate", result.candidate)):
        line = f"memory  {label}: {peaks(model.peak_memory_bytes, model.gpu_memory_bytes)}"
        if model.capacity is not None:
            fits = model.capacity
            line += f", weights {fits.weight_bytes / 2**30:.2f} GiB"
            line += f", KV cache {fits.kv_bytes_per_request / 2**20:.1f} MiB a request"
        lines.append(line)
    measured = tuple(one.capacity for one in (result.baseline, result.candidate) if one.capacity is not None)
    # Models that were cut in depth hold what nobody serves: the whole ones are told instead.
    held = result.whole_capacities or measured
    if held:
        whole = "the whole " if result.whole_capacities else ""
        lines.append(
            f"memory  in the {held[0].memory_bytes / 2**30:.2f} GiB of {whole}baseline and its batch, requests of "
            f"{result.settings.tokens_per_request} tokens: "
            + ", ".join(
                f"{label} {fits.requests}"
                + (f" ({fits.kv_bytes_per_request / 2**20:.1f} MiB each)" if result.whole_capacities else "")
                for label, fits in zip(("baseline", "candidate"), held, strict=True)
            )
        )
    return lines


# This sentence stands before the verdict of a check at several depths.
WHOLE_MODELS = (
    "The verdict is on the whole models, which were not measured: their depth is extrapolated from the others."
)

# This sentence stands before the verdict of a claim that names a part of the grid.
UNCLAIMED = "Verdicts in brackets are of regimes that the claim does not name; they do not count."

_COLUMNS = (
    "regime",
    "layers",
    "batch",
    "context",
    "baseline",
    "candidate",
    "ratio",
    "95 % interval",
    "ceiling",
    "reached",
    "noise",
    "verdict",
    "strict",
)


def _whole_row(result: Extrapolated) -> tuple[str, ...]:
    ratio = result.ratio
    return (
        result.regime.value,
        f"{result.layers} (extrapolated)",
        result.batches,
        f"{result.context_tokens:g}",
        f"{result.baseline.total_s:.4f} s",
        f"{result.candidate.total_s:.4f} s",
        f"{ratio.median:.3f}",
        f"\\[{ratio.low:.3f}, {ratio.high:.3f}]",
        f"{result.ceiling:.3f}",
        f"{result.of_ceiling:.0%}",
        f"{result.noise.spread:.1%}",
        _verdict(result),
        result.strict_verdict.value,
    )


def _row(result: RegimeResult, layers: int) -> tuple[str, ...]:
    ratio = result.ratio
    return (
        result.regime.value,
        str(layers),
        result.batches,
        f"{result.context_tokens:g}",
        f"{result.baseline.median:.4f} s",
        f"{result.candidate.median:.4f} s",
        f"{ratio.median:.3f}",
        f"\\[{ratio.low:.3f}, {ratio.high:.3f}]",
        f"{result.ceiling:.3f}",
        f"{result.of_ceiling:.0%}",
        f"{max(result.baseline_noise, result.candidate_noise):.1%}",
        _verdict(result),
        result.strict_verdict.value,
    )


def _verdict(result: RegimeResult | Extrapolated) -> str:
    told = f"[{_COLOURS[result.verdict]}]{result.verdict.value}[/]"
    return told if result.claimed else f"({told})"


def claim_line(result: SpeedupResult) -> str:
    """The claim with its margin, and the parts of the grid that it names."""
    named = result.settings.named
    return f"{result.settings.claimed}" + (f" at {', '.join(map(str, named))}" if named else "")


def verdict_line(result: SpeedupResult) -> str:
    """The claim with its margin, the verdict, and the strict one beside it."""
    return f"{claim_line(result)}: {result.verdict.value}{_strictly(result)}"


def _strictly(result: SpeedupResult) -> str:
    return f" (strictly: {result.strict_verdict.value})" if result.settings.margin else ""


def _model(model: ModelRecord) -> str:
    shape = model.shape
    parameters = f"{model.parameters / 1e6:,.1f} M parameters"
    return f"{model.name}: {parameters}, hidden {shape.hidden}, {shape.layers} layers"

"""A speed-up result as a person reads it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pat_serve.server.speedup_result import ModelRecord, RegimeResult, SpeedupResult
from pat_serve.server.verdict import Verdict

_COLOURS = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.INCONCLUSIVE: "yellow"}
# Of the table where stdout has no width of its own: a file or a pipe.
_PLAIN_WIDTH = 120


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
    console.print(
        f"{result.dtype}, {kind}, {settings.rounds} paired rounds, vLLM {result.machine['vllm']}, {machine}\n"
    )
    table = Table(*_COLUMNS)
    for regime in result.regimes:
        table.add_row(*_row(regime))
    console.print(table)
    colour = _COLOURS[result.verdict]
    console.print(f"claim {settings.claim:g}x: [bold {colour}]{result.verdict.value.upper()}[/]")
    console.print(result.reason, markup=False, soft_wrap=True)


_COLUMNS = (
    "regime",
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
)


def _row(result: RegimeResult) -> tuple[str, ...]:
    ratio = result.ratio
    return (
        result.regime.value,
        str(result.batch_size),
        f"{result.context_tokens:g}",
        f"{result.baseline.median:.4f} s",
        f"{result.candidate.median:.4f} s",
        f"{ratio.median:.3f}",
        f"\\[{ratio.low:.3f}, {ratio.high:.3f}]",
        f"{result.ceiling:.3f}",
        f"{result.of_ceiling:.0%}",
        f"{max(result.baseline_noise, result.candidate_noise):.1%}",
        f"[{_COLOURS[result.verdict]}]{result.verdict.value}[/]",
    )


def _model(model: ModelRecord) -> str:
    shape = model.shape
    parameters = f"{model.parameters / 1e6:,.1f} M parameters"
    return f"{model.name}: {parameters}, hidden {shape.hidden_size}, {shape.num_layers} layers"

"""pat-bench plan: compute on paper the engines and costs that a traffic needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pat_serve.cli.app import Debug
from pat_serve.cli.bench.options import Force, Json, Out, bounds, check_outputs, choices, progress_line, write_report
from pat_serve.errors import UsageError


def plan(
    baseline: Annotated[
        list[Path],
        typer.Option(help="Record of pat-bench latency for the dense model, or of pat-bench speedup; repeatable."),
    ],
    candidate: Annotated[
        list[Path] | None, typer.Option(help="The same for the pruned model; a record of pat-bench speedup holds both.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests a second over all engines, as a Poisson process.")] = 1.0,
    prompt_tokens: Annotated[
        str, typer.Option(help="Prompt tokens of a request: 128, or 64:0.7,256:0.3 with weights.")
    ] = "128",
    output_tokens: Annotated[
        str, typer.Option(help="Output tokens of a request, in the same form; drawn independently.")
    ] = "64",
    lengths: Annotated[
        Path | None,
        typer.Option(help="JSONL file with prompt_tokens and output_tokens a row, instead of these two flags."),
    ] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(help="Bound in seconds of a good request, as ttft=0.5, tpot=0.1 or e2e=2; repeatable."),
    ] = None,
    percentile: Annotated[float, typer.Option(help="How many of a hundred requests must meet all bounds.")] = 90.0,
    dispatch: Annotated[
        str, typer.Option(help="How requests go to engines: least-loaded or round-robin.")
    ] = "least-loaded",
    max_batch: Annotated[
        int | None, typer.Option(help="Requests that an engine takes at once. [default: the largest measured batch]")
    ] = None,
    max_step_tokens: Annotated[int, typer.Option(help="Prompt tokens that one step takes up.")] = 2048,
    kv_cache_gib: Annotated[
        float | None, typer.Option(help="GiB for an engine's keys and values. [default: the batch is the only bound]")
    ] = None,
    memory_gib: Annotated[
        float | None,
        typer.Option(help="GiB for an engine's weights, keys and values together, instead of --kv-cache-gib."),
    ] = None,
    overhead: Annotated[float, typer.Option(help="Seconds that the server in front adds to the first token.")] = 0.0,
    devices_per_engine: Annotated[
        int,
        typer.Option(help="GPUs that a measured engine spans: tensor parallel degree times pipeline parallel degree."),
    ] = 1,
    price_per_hour: Annotated[float | None, typer.Option(help="Price of one machine or GPU.")] = None,
    max_replicas: Annotated[int, typer.Option(help="Most engines to try.")] = 256,
    requests: Annotated[int, typer.Option(help="Requests to simulate in each repeat.")] = 2000,
    repeats: Annotated[int, typer.Option(help="Number of simulations; the SLO must be met in each.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of arrivals and lengths.")] = 0,
    as_json: Json = False,
    out: Out = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Simulate which engines, machines or GPUs and costs a traffic needs, dense and pruned (docs/planning.md).

    Exit code 1: no number of engines meets the SLO. Exit code 3: --max-replicas engines are too few to tell, or the
    measurements were disturbed. Example:

        pat-bench latency --model dense/ --batch-size 1,2,4,8 --prompt-tokens 128 --output-tokens 64 --out dense.json

        pat-bench latency --model pruned/ --batch-size 1,2,4,8 --prompt-tokens 128 --output-tokens 64 --out pruned.json

        pat-bench plan --baseline dense.json --candidate pruned.json --rate 20 --slo ttft=0.5 --slo tpot=0.1
    """
    from pat_serve.server.bench.planning.result import PlanSettings
    from pat_serve.server.bench.planning.run import make_plan
    from pat_serve.server.bench.planning.table import print_plan

    settings = PlanSettings.model_validate(
        {
            "rate": rate,
            "prompt_tokens": _kinds("--prompt-tokens", prompt_tokens),
            "output_tokens": _kinds("--output-tokens", output_tokens),
            "lengths": str(lengths) if lengths else None,
            "slo": bounds("--slo", slo or ()),
            "percentile": percentile,
            "dispatch": choices("--dispatch", [dispatch], ("least-loaded", "round-robin"))[0],
            "max_batch": max_batch,
            "max_step_tokens": max_step_tokens,
            "kv_cache_gib": kv_cache_gib,
            "memory_gib": memory_gib,
            "overhead_s": overhead,
            "devices_per_engine": devices_per_engine,
            "price_per_hour": price_per_hour,
            "max_replicas": max_replicas,
            "requests": requests,
            "repeats": repeats,
            "seed": seed,
        }
    )
    check_outputs(out, force=force)
    with progress_line() as progress:
        result = make_plan(baseline, candidate or (), settings, progress=progress)
    write_report(result, out=out, html=None, as_json=as_json, show=lambda: print_plan(result))
    raise typer.Exit(result.exit_code)


def _kinds(flag: str, given: str) -> tuple[tuple[int, float], ...]:
    """Read lengths with weights: 64 or 64:0.7,256:0.3."""
    try:
        kinds = tuple(
            (int(tokens), float(weight or 1))
            for tokens, _, weight in (word.partition(":") for word in given.split(","))
        )
    except ValueError:
        kinds = ()
    if not kinds or any(tokens < 1 or not 0 < weight < float("inf") for tokens, weight in kinds):
        raise UsageError(
            flag,
            expected="a number of tokens, or several with weights as 64:0.7,256:0.3",
            found=repr(given),
            fix=f"Try {flag} 128.",
        )
    return kinds

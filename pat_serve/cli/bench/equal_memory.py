"""pat-bench equal-memory: what both models serve from the same memory, under a real load."""

from __future__ import annotations

from typing import Annotated

import typer

from pat_serve.cli.app import Debug
from pat_serve.cli.bench.options import (
    Dtype,
    Force,
    Json,
    Out,
    bounds,
    check_outputs,
    numbers,
    progress_line,
    write_report,
)


def equal_memory(
    baseline: Annotated[str, typer.Option(help="Dense model: a folder with weights, or a .gguf file.")],
    candidate: Annotated[str, typer.Option(help="Model that is claimed to serve more from the same memory.")],
    slo: Annotated[
        list[str],
        typer.Option(help="Bound in seconds of a good request, as ttft=1, tpot=0.1 or e2e=5; repeatable."),
    ],
    claim: Annotated[float, typer.Option(help="Times as many good requests a second as the baseline.")] = 1.2,
    margin: Annotated[
        float, typer.Option(help="The claim is met by an interval at or above claim x (1 - margin).")
    ] = 0.02,
    memory_gib: Annotated[
        float | None,
        typer.Option(help="GiB for weights and KV cache of each. [default: the baseline's with --requests of them]"),
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests of the baseline that are to fit, without --memory-gib.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 448,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    rate: Annotated[str, typer.Option(help="Requests a second, with a run for each, as 1,2,4.")] = "1",
    seconds: Annotated[float, typer.Option(help="Seconds of each run.")] = 20.0,
    rounds: Annotated[int, typer.Option(help="Pairs of series of runs, at least 5.")] = 5,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Seed of prompts, arrivals and bootstrap.")] = 0,
    as_json: Json = False,
    out: Out = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Check how much more a smaller model serves from the same memory: pass (exit 0), fail (1) or inconclusive (3).

    A server of its own runs for each model; smaller weights leave it a larger KV cache. guidellm loads them in turns
    (extra bench). The claim is about goodput: requests a second that keep every --slo. Example:

        pat-bench equal-memory --baseline dense/ --candidate pruned/ --rate 2,4,8 --slo ttft=1 --slo tpot=0.1
    """
    from pat_serve.server.bench.equal_memory.result import EqualMemorySettings
    from pat_serve.server.bench.equal_memory.run import measure_equal_memory
    from pat_serve.server.bench.equal_memory.table import print_equal_memory

    settings = EqualMemorySettings(
        claim=claim,
        margin=margin,
        memory_gib=memory_gib,
        requests=requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        rates=numbers("--rate", rate),
        seconds=seconds,
        slo=bounds("--slo", slo),
        rounds=rounds,
        dtype=dtype,
        seed=seed,
    )
    check_outputs(out, force=force)
    with progress_line() as progress:
        result = measure_equal_memory(baseline, candidate, settings, progress=progress)
    write_report(result, out=out, html=None, as_json=as_json, show=lambda: print_equal_memory(result))
    raise typer.Exit(result.verdict.exit_code)

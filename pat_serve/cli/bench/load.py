"""pat-bench load: load a server over HTTP as users do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pat_serve.cli.app import Debug
from pat_serve.cli.bench.options import (
    Force,
    Html,
    Json,
    Out,
    PromptTokens,
    bounds,
    check_outputs,
    choices,
    numbers,
    progress_line,
    write_report,
)
from pat_serve.errors import EngineError


def load(
    url: Annotated[str, typer.Option(help="Address of a server with OpenAI's routes.")] = "http://127.0.0.1:8000",
    profile: Annotated[str, typer.Option(help="How requests arrive: constant, poisson or sweep.")] = "poisson",
    rate: Annotated[
        str, typer.Option(help="Requests a second, with a run for each, as 0.5,1,2. A sweep finds its own.")
    ] = "1",
    sweep_size: Annotated[int, typer.Option(help="Number of runs in a sweep.")] = 5,
    prompt_tokens: PromptTokens = 64,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 16,
    seconds: Annotated[float, typer.Option(help="Seconds of each run.")] = 20.0,
    slo: Annotated[
        list[str] | None,
        typer.Option(help="Bound in seconds of a good request, as ttft=0.2, tpot=0.05 or e2e=2; repeatable."),
    ] = None,
    served_model: Annotated[str, typer.Option(help="The server's name of the model. [default: its first model]")] = "",
    tokenizer: Annotated[
        str, typer.Option(help="Folder or hub id of the tokenizer. [default: the server names it]")
    ] = "",
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the server's key. [default: PAT_BENCH_API_KEY has it]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts and arrivals.")] = 0,
    as_json: Json = False,
    out: Out = None,
    html: Html = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Measure latency under load and goodput, with guidellm as the client (extra bench).

    Exit code 1: no request succeeded. Example:

        pat-bench load --url http://127.0.0.1:8000 --rate 1,2,4 --slo ttft=0.2 --slo tpot=0.05
    """
    from pat_serve.server.bench.load.result import LoadSettings
    from pat_serve.server.bench.load.run import run_load
    from pat_serve.server.bench.load.table import print_load

    settings = LoadSettings.model_validate(
        {
            "url": url,
            "profile": choices("--profile", [profile], ("constant", "poisson", "sweep"))[0],
            "rates": numbers("--rate", rate),
            "sweep_size": sweep_size,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "seconds": seconds,
            "slo": bounds("--slo", slo or ()),
            "model": served_model,
            "tokenizer": tokenizer,
            "seed": seed,
        }
    )
    check_outputs(out, html, force=force)
    with progress_line() as progress:
        progress("guidellm is running", 0, 1)
        result = run_load(settings, api_key=_key(api_key_file))
    write_report(result, out=out, html=html, as_json=as_json, show=lambda: print_load(result))
    if not any(run.completed for run in result.runs):
        raise EngineError(
            f"--url {url}",
            expected="answers",
            found=f"none, and {sum(run.errored for run in result.runs)} errors",
            fix="Look at the server's log; try fewer --prompt-tokens, a lower --rate, or more --seconds.",
        )


def _key(file: Path | None) -> str | None:
    """Read the file's first key, or else the environment's."""
    if file is None:
        return os.environ.get("PAT_BENCH_API_KEY") or None
    from pat_serve.server.http.keys import first_key

    return first_key(file)

"""pat-serve: serve a model folder over HTTP with vLLM."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from pat_serve.cli.app import Debug, run_command
from pat_serve.errors import MissingExtra, UsageError

Flag = typer.Option


def serve(
    model: Annotated[str, Flag(help="Model folder (what pat-export writes) or hub id.")],
    vllm_flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM_FLAGS]", help="Flags for vLLM's own server, after --.")
    ] = None,
    host: Annotated[str, Flag(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, Flag(min=1, max=65535)] = 8000,
    dtype: Annotated[
        str,
        Flag(help="auto, float32, bfloat16, float16. auto: what this CPU computes natively; on a GPU the model's."),
    ] = "auto",
    max_model_len: Annotated[
        int | None, Flag(min=2, help="Tokens of prompt and output together. [default: the model's]")
    ] = None,
    kv_cache_gib: Annotated[
        float | None,
        Flag(min=0.01, help="GiB for keys and values. [default on CPU: 4, at most a quarter of the free memory]"),
    ] = None,
    compiled: Annotated[
        bool, Flag("--compile", help="CPU: compile the model at the start; needs g++, adds a minute, decodes faster.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP: /generate, /ready, /benchmark/latency, /benchmark/throughput and OpenAI's /v1 routes.

    Example:

        pat-serve --model pruned/ --port 8000

        curl localhost:8000/generate -H 'Content-Type: application/json' -d '{"prompt": "Hello", "max_tokens": 16}'

    Anything after -- goes to vLLM: pat-serve --model pruned/ -- --max-num-seqs 8 --api-key SECRET
    """
    flags = tuple(vllm_flags or ())
    if flags and not flags[0].startswith("-"):
        raise UsageError(
            flags[0],
            expected="flags only",
            found="a word without a flag",
            fix="Give the model as --model MODEL; flags for vLLM come after --.",
        )
    if find_spec("vllm") is None:
        raise MissingExtra(
            "pat-serve",
            expected="the packages of the cpu or cuda extra",
            found="no module vllm",
            fix='Install them: pip install "pat-serve[cpu]" or "pat-serve[cuda]".',
        )
    from pat_serve.server.launch import ServeSettings, run

    run(
        ServeSettings(
            model=model,
            host=host,
            port=port,
            dtype=dtype,
            max_model_len=max_model_len,
            kv_cache_gib=kv_cache_gib,
            compiled=compiled,
            vllm_flags=flags,
        )
    )


def main() -> None:
    """Entry point."""
    run_command(serve)

"""pat-serve: serve a model folder over HTTP with vLLM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from pat_serve.cli.app import Debug, run_command
from pat_serve.errors import UsageError, want
from pat_serve.machine.extras import require
from pat_serve.machine.hardware import DTYPE_ALIASES, DTYPE_BYTES

Flag = typer.Option
MAX_TIMEOUT_S = 86_400
DTYPES = ("auto", *DTYPE_BYTES, *DTYPE_ALIASES)


def serve(
    model: Annotated[str, Flag(help="Model folder (what pat-export writes), .gguf file or hub id.")],
    vllm_flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM_FLAGS]", help="Flags for vLLM's own server, after --.")
    ] = None,
    baseline: Annotated[
        str | None,
        Flag(help="Dense parent: runs beside the model, for /benchmark/speedup, /baseline/generate and the page."),
    ] = None,
    host: Annotated[
        str, Flag(help="Address to listen on. 0.0.0.0 lets other machines in: give keys then.")
    ] = "127.0.0.1",
    port: Annotated[int, Flag(min=1, max=65535)] = 8000,
    dtype: Annotated[
        str,
        Flag(help="auto, float32, bfloat16 or float16. auto: the CPU's native dtype, or on a GPU the model's."),
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
    draft: Annotated[
        str | None,
        Flag(help="Pruned model that proposes tokens for this model to check; the same output often comes sooner."),
    ] = None,
    draft_tokens: Annotated[int, Flag(min=1, max=16, help="Tokens that the draft proposes a step.")] = 3,
    api_key: Annotated[
        list[str] | None,
        Flag(
            metavar="[NAME=]KEY",
            help="Ask for this key on every route except /health and /ready; repeatable. Other users of this machine "
            "can read a command line: prefer --api-key-file or PAT_SERVE_API_KEYS.",
        ),
    ] = None,
    api_key_file: Annotated[Path | None, Flag(help="File with one [NAME=]KEY a line.")] = None,
    public_metrics: Annotated[bool, Flag("--public-metrics", help="/metrics asks for no key.")] = False,
    public_page: Annotated[bool, Flag("--public-page", help="The page's files ask for no key; the page does.")] = False,
    max_body_mib: Annotated[float, Flag(min=0.001, help="Largest body of a request, in MiB.")] = 4.0,
    max_bodies_mib: Annotated[
        float, Flag(min=0.001, help="MiB of all requests' bodies together; further requests get 503.")
    ] = 256.0,
    max_sequences: Annotated[int, Flag(min=1, help="Most sequences of one request: prompts times n.")] = 128,
    max_queue: Annotated[
        int | None,
        Flag(min=0, help="Sequences that may wait; further ones get 503. [default: 4 times --max-num-seqs]"),
    ] = None,
    max_concurrency_per_key: Annotated[
        int | None,
        Flag(min=1, help="Requests of one key that may be under way; further ones get 429. [default: unbounded]"),
    ] = None,
    max_connections: Annotated[int, Flag(min=1, help="Connections that may be open at once.")] = 2048,
    request_timeout: Annotated[float, Flag(min=0.1, help="Seconds that an answer may take.")] = 600.0,
    receive_timeout: Annotated[
        float, Flag(min=0.1, help="Seconds for a request's headers, and again for its body.")
    ] = 20.0,
    send_timeout: Annotated[float, Flag(min=0.1, help="Seconds until a client that does not read is cut off.")] = 60.0,
    shutdown_timeout: Annotated[
        float, Flag(min=0, help="Seconds that requests under way may take after SIGTERM; a second SIGTERM ends them.")
    ] = 30.0,
    allow: Annotated[
        list[str] | None,
        Flag(
            help="Feature that requests may use: structured-output, chat-template, media or prompt-embeds; repeatable."
        ),
    ] = None,
    no_benchmarks: Annotated[
        bool,
        Flag("--no-benchmarks", help="Refuse POST /benchmark/*, with which every user of the server could load it."),
    ] = False,
    log_format: Annotated[
        str, Flag(help="Form of the access log, one line a request on stdout: text or json.")
    ] = "text",
    debug: Debug = False,
) -> Callable[[], None]:
    """Serve a model over HTTP: a page at /, /generate, /ready, /benchmark/* and OpenAI's /v1 routes.

    Example:

        pat-serve --model pruned/ --port 8000

        curl localhost:8000/generate -H 'Content-Type: application/json' -d '{"prompt": "Hello", "max_tokens": 16}'

    With its dense parent beside it, to check the speed-up live: pat-serve --model pruned/ --baseline dense/

    Anything after -- goes to vLLM: pat-serve --model pruned/ -- --max-num-seqs 8
    """
    flags = tuple(vllm_flags or ())
    if flags and not flags[0].startswith("-"):
        raise UsageError(
            flags[0],
            expected="flags only",
            found="a word without a flag",
            fix="Give the model as --model MODEL; flags for vLLM come after --.",
        )
    want("--dtype", dtype in DTYPES, f"one of {', '.join(DTYPES)}", dtype, "Leave it out to let the machine decide.")
    for flag, value in (
        ("--request-timeout", request_timeout),
        ("--receive-timeout", receive_timeout),
        ("--send-timeout", send_timeout),
        ("--shutdown-timeout", shutdown_timeout),
    ):
        # Timers do not take infinity, and the system's alarm clock takes 68 years at most.
        want(flag, value <= MAX_TIMEOUT_S, f"at most {MAX_TIMEOUT_S} s, a day", value, "Give fewer seconds.")
    for flag, size in (
        ("--max-body-mib", max_body_mib), ("--max-bodies-mib", max_bodies_mib), ("--kv-cache-gib", kv_cache_gib),
    ):  # fmt: skip
        want(flag, size is None or isfinite(size), "a size", size, "Give a number.")
    # This comes before any import of the server, which imports the extra's packages.
    require("vllm", "cpu", "cuda", wanted_by="pat-serve")
    from pat_serve.server.http.policy import MIB, Feature, Policy

    unknown = [name for name in allow or () if name not in list(Feature)]
    if unknown:
        raise UsageError(
            "--allow",
            expected=", ".join(Feature),
            found=unknown[0],
            fix="Choose one of them, or repeat the flag for several.",
        )
    from pat_serve.server.http.access_log import LogFormat
    from pat_serve.server.start.launch import run
    from pat_serve.server.start.settings import ServeSettings

    if log_format not in list(LogFormat):
        raise UsageError("--log-format", expected=", ".join(LogFormat), found=log_format, fix="Choose one of them.")
    settings = ServeSettings(
        model=model,
        host=host,
        port=port,
        dtype=dtype,
        max_model_len=max_model_len,
        kv_cache_gib=kv_cache_gib,
        compiled=compiled,
        draft=draft,
        draft_tokens=draft_tokens,
        vllm_flags=flags,
        policy=Policy(
            public_metrics=public_metrics,
            public_page=public_page,
            max_body_bytes=int(max_body_mib * MIB),
            max_bodies_bytes=int(max_bodies_mib * MIB),
            max_sequences=max_sequences,
            max_queue=max_queue,
            max_concurrency_per_key=max_concurrency_per_key,
            max_connections=max_connections,
            request_timeout_s=request_timeout,
            receive_timeout_s=receive_timeout,
            send_timeout_s=send_timeout,
            shutdown_timeout_s=shutdown_timeout,
            allowed=frozenset(Feature(name) for name in allow or ()),
            benchmarks=not no_benchmarks,
        ),
        api_keys=tuple(api_key or ()),
        api_key_file=api_key_file,
        log_format=LogFormat(log_format),
        baseline=baseline,
    )
    return partial(run, settings)


def main() -> None:
    """Run the command line of `pat-serve`, to the end of the process."""
    run_command(serve)

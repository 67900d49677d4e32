"""pat-bench latency and pat-bench throughput: measure one model by itself."""

from __future__ import annotations

from typing import Annotated

import typer

from pat_serve.cli.app import Debug
from pat_serve.cli.bench.options import (
    Dtype,
    Force,
    Html,
    Json,
    LoadFormat,
    Out,
    OutputTokens,
    PromptTokens,
    Roofline,
    check_outputs,
    engine_settings,
    integers,
    progress_line,
    write_report,
)
from pat_serve.machine.extras import require

Model = Annotated[str, typer.Option(help="Folder, .gguf, hub id, or a shipped shape (llama2-7b, ...).")]
Layers = Annotated[int | None, typer.Option(help="Number of layers to cut the model to; random weights only.")]
Eager = Annotated[bool, typer.Option(help="Run the model without torch.compile.")]
Seed = Annotated[int, typer.Option(help="Seed of prompts and random weights.")]


def latency(
    model: Model,
    batch_size: Annotated[str, typer.Option(help="Requests at once, as 1,4,16.")] = "1",
    prompt_tokens: Annotated[str, typer.Option(help="Tokens of each prompt, as 32,128.")] = "128",
    output_tokens: Annotated[str, typer.Option(help="Tokens that each request generates, as 8,32.")] = "32",
    rounds: Annotated[int, typer.Option(help="Number of timed runs of each cell.")] = 10,
    layers: Layers = None,
    load_format: LoadFormat = "auto",
    dtype: Dtype = "auto",
    enforce_eager: Eager = True,
    roofline: Roofline = True,
    seed: Seed = 0,
    as_json: Json = False,
    out: Out = None,
    html: Html = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Measure times to first token, per output token and to the end, p50 to p99.9, for every batch x prompt x output.

    The batch runs by itself in a vLLM engine, without a server in front. The floor is the least time that the counted
    bytes and FLOPs take on this machine. Example:

        pat-bench latency --model pruned/ --batch-size 1,4 --prompt-tokens 32,128 --html latency.html
    """
    # This check comes before the imports, which need the extra. The imports stand here to keep --help fast.
    require("vllm", "cpu", "cuda", wanted_by="pat-bench latency")
    from pat_serve.server.bench.latency.result import LatencySettings
    from pat_serve.server.bench.latency.run import measure_latency
    from pat_serve.server.bench.latency.table import print_latency

    settings = LatencySettings.model_validate(
        {
            "batch_sizes": integers("--batch-size", batch_size),
            "prompt_tokens": integers("--prompt-tokens", prompt_tokens),
            "output_tokens": integers("--output-tokens", output_tokens),
            "rounds": rounds,
            "roofline": roofline,
        }
        | engine_settings(layers=layers, load_format=load_format, dtype=dtype, enforce_eager=enforce_eager, seed=seed)
    )
    check_outputs(out, html, force=force)
    with progress_line() as progress:
        result = measure_latency(model, settings, progress=progress)
    write_report(result, out=out, html=html, as_json=as_json, show=lambda: print_latency(result))


def throughput(
    model: Model,
    concurrency: Annotated[str, typer.Option(help="Requests in flight, as 1,4,16.")] = "1,4",
    saturate: Annotated[bool, typer.Option(help="Double the last number until that gains less than 5 %.")] = True,
    max_concurrency: Annotated[int, typer.Option(help="Most requests in flight that the doubling reaches.")] = 64,
    prompt_tokens: PromptTokens = 64,
    output_tokens: OutputTokens = 16,
    waves: Annotated[int, typer.Option(help="Requests of a run, as a multiple of its concurrency.")] = 3,
    layers: Layers = None,
    load_format: LoadFormat = "auto",
    dtype: Dtype = "auto",
    enforce_eager: Eager = True,
    roofline: Roofline = True,
    seed: Seed = 0,
    as_json: Json = False,
    out: Out = None,
    html: Html = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Measure tokens and requests a second at a fixed number of requests in flight, and at saturation.

    The next request is submitted when one ends, without a server in front. Example:

        pat-bench throughput --model pruned/ --concurrency 1,8 --out throughput.json
    """
    require("vllm", "cpu", "cuda", wanted_by="pat-bench throughput")
    from pat_serve.server.bench.latency.result import ThroughputSettings
    from pat_serve.server.bench.latency.run import measure_throughput
    from pat_serve.server.bench.latency.table import print_throughput

    settings = ThroughputSettings.model_validate(
        {
            "concurrencies": integers("--concurrency", concurrency),
            "saturate": saturate,
            "max_concurrency": max_concurrency,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "waves": waves,
            "roofline": roofline,
        }
        | engine_settings(layers=layers, load_format=load_format, dtype=dtype, enforce_eager=enforce_eager, seed=seed)
    )
    check_outputs(out, html, force=force)
    with progress_line() as progress:
        result = measure_throughput(model, settings, progress=progress)
    write_report(result, out=out, html=html, as_json=as_json, show=lambda: print_throughput(result))

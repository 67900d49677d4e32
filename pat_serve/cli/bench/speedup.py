"""pat-bench speedup: check a claimed speed-up, with a verdict."""

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
    PromptTokens,
    Roofline,
    RoundPairs,
    check_outputs,
    choices,
    engine_settings,
    integers,
    progress_line,
    write_report,
)
from pat_serve.machine.extras import require

BOTH = ("prefill", "decode")


def speedup(
    baseline: Annotated[
        str,
        typer.Option(help="Dense model: folder, .gguf, hub id, or a shipped shape (llama2-7b, llama2-7b-pat25, ...)."),
    ],
    candidate: Annotated[str, typer.Option(help="Model that is claimed to be faster, in the same forms.")],
    claim: Annotated[float, typer.Option(help="The speed-up to check.")] = 1.33,
    margin: Annotated[
        float,
        typer.Option(
            help="The claim is met by an interval at or above claim x (1 - margin); 0 reads the claim strictly."
        ),
    ] = 0.02,
    batch_size: Annotated[str, typer.Option(help="Requests at once; give several as 1,4,16.")] = "1",
    grid: Annotated[
        str | None,
        typer.Option(
            help="Several batches, each with prompts of its own length, as 1x128,8x1024 (requests x prompt tokens); "
            "each is judged by itself, in the same engines. Replaces --batch-size and --prompt-tokens."
        ),
    ] = None,
    claim_at: Annotated[
        str | None,
        typer.Option(
            help="The regimes that the claim names, as 8x1024 or 8x1024:decode; they alone decide the exit code. "
            "[default: all that are measured]"
        ),
    ] = None,
    prompt_tokens: PromptTokens = 128,
    output_tokens: Annotated[int, typer.Option(help="Tokens that each request generates, for decode.")] = 9,
    rounds: RoundPairs = 12,
    precision: Annotated[
        float | None, typer.Option(help="Make rounds until every interval is at most this wide: 0.02 is 2 %.")
    ] = None,
    max_rounds: Annotated[int, typer.Option(help="Most rounds, with --precision.")] = 60,
    max_minutes: Annotated[float, typer.Option(help="Minutes after which no round begins, with --precision.")] = 15.0,
    fixed_memory: Annotated[
        bool,
        typer.Option(
            "--fixed-memory",
            help="Equal memory instead of an equal batch: the candidate gets as many requests as fit into what the "
            "baseline takes with --batch-size of them; the ratio is that of throughputs.",
        ),
    ] = False,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="The paper's measure: time to the first tokens of batches of 128-token prompts, averaged over batch "
            "sizes (1,2,4,8 unless --batch-size names several).",
        ),
    ] = False,
    regime: Annotated[
        str,
        typer.Option(
            help="What to judge: prefill, decode or both. With decode alone all rounds have the same prompts, and only "
            "the first prefills them."
        ),
    ] = "prefill,decode",
    layers: Annotated[
        str | None,
        typer.Option(
            help="Cut both models to so many layers; random weights only. Several as 2,6: each is measured, and the "
            "verdict is on the whole models that their lines lead to. [default: all, or two depths that fit]"
        ),
    ] = None,
    load_format: LoadFormat = "auto",
    dtype: Dtype = "auto",
    enforce_eager: Annotated[bool, typer.Option(help="Run the models without torch.compile.")] = True,
    roofline: Roofline = True,
    seed: Annotated[int, typer.Option(help="Seed of prompts, random weights and bootstrap.")] = 0,
    as_json: Json = False,
    out: Out = None,
    html: Html = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Check a claimed speed-up: pass (exit 0), fail (exit 1) or inconclusive (exit 3).

    Both models run in turns, each in a vLLM process of its own, with the same prompts. The verdict is on the bootstrap
    interval of the paired ratios. The ceiling beside it comes from counted bytes and FLOPs.

    The paper's shapes need no weights, and can be cut until a small machine holds them:

        pat-bench speedup --baseline llama2-7b --candidate llama2-7b-pat25 --layers 2,6 --load-format dummy

    A claim about several regimes, of which decode at batch 8 decides:

        pat-bench speedup --baseline dense/ --candidate pruned/ --grid 1x128,8x1024 --claim-at 8x1024:decode
    """
    # This check comes before the imports, which need the extra. The imports stand here to keep --help fast.
    require("vllm", "cpu", "cuda", wanted_by="pat-bench speedup")
    from pat_serve.errors import UsageError
    from pat_serve.server.bench.speedup.check import check_speedup
    from pat_serve.server.bench.speedup.grid import parse_grid, parse_named
    from pat_serve.server.bench.speedup.settings import PAPER_BATCH_SIZES, PAPER_PROMPT_TOKENS, SpeedupSettings
    from pat_serve.server.bench.speedup.table import print_result

    cells = parse_grid(grid, "--grid") if grid else ()
    named = parse_named(claim_at, "--claim-at") if claim_at else ()
    if cells and (paper or fixed_memory):
        found = "--paper" if paper else "--fixed-memory"
        raise UsageError("--grid", expected="each batch judged by itself", found=found, fix="Leave one of them out.")
    sizes = integers("--batch-size", batch_size)
    depths = () if layers is None else integers("--layers", layers)
    regimes = choices("--regime", regime.split(","), BOTH) if regime != "both" else BOTH
    if paper:
        sizes = sizes if len(sizes) > 1 else PAPER_BATCH_SIZES
        regimes, prompt_tokens = ("prefill",), PAPER_PROMPT_TOKENS
    settings = SpeedupSettings.model_validate(
        {
            "claim": claim,
            "margin": margin,
            "batch_size": sizes[0],
            "batch_sizes": sizes if len(sizes) > 1 else (),
            "grid": cells,
            "named": named,
            "judge_average": paper,
            "fixed_memory": fixed_memory,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "rounds": rounds,
            "precision": precision,
            "max_rounds": max_rounds,
            "max_seconds": max_minutes * 60,
            "regimes": regimes,
            "roofline": roofline,
            "depths": depths if len(depths) > 1 else (),
        }
        | engine_settings(
            layers=depths[0] if len(depths) == 1 else None,
            load_format=load_format,
            dtype=dtype,
            enforce_eager=enforce_eager,
            seed=seed,
        )
    )
    check_outputs(out, html, force=force)
    with progress_line() as progress:
        result = check_speedup(baseline, candidate, settings, progress=progress)
    write_report(result, out=out, html=html, as_json=as_json, show=lambda: print_result(result))
    raise typer.Exit(result.verdict.exit_code)

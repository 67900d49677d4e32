"""pat-export verify: judge an export again, against the run from which it was made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pat_serve.cli.app import Debug, run_command

Flag = typer.Option


def verify(
    pruned: Annotated[Path, typer.Argument(help="Folder of an export (pruned/).")],
    ckpt: Annotated[Path, Flag("--ckpt", help="The finished training run that it was exported from (run/).")],
    base: Annotated[str | None, Flag(help="Where the base model lies now, if it was moved since.")] = None,
    vllm: Annotated[
        bool, Flag("--vllm", help="Compare in vLLM too; each dtype starts an engine, which takes a minute.")
    ] = False,
    walk: Annotated[
        bool | None,
        Flag("--walk/--no-walk", help="Load one layer at a time. [default: when the model would not fit into memory]"),
    ] = None,
    as_json: Annotated[bool, Flag("--json", help="Print the outcome to stdout as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Check an export: its files against the hashes of the export, its function against the trained model.

    Example: `pat-export verify pruned/ --ckpt run/`

    Exit codes: 0 all is well, 1 a file or a figure is wrong, 2 wrong usage.
    """
    from pat_serve.export.parity.report import parity_lines
    from pat_serve.export.verify import verify_export
    from pat_serve.server.engine.workers.scoring import score_with_vllm
    from pat_serve.terminal.progress import say

    found = verify_export(pruned, ckpt, base=base, walk=walk, scorer=score_with_vllm if vllm else None)
    say(
        f"{pruned}: {len(found.files)} files are those of the export"
        if found.files
        else f"{pruned}: no hashes recorded"
    )
    say("\n".join(parity_lines(found.parity)))
    if found.quality is not None:
        say(f"{found.quality.scheme}: {found.quality.describe()}")
    if as_json:
        sys.stdout.write(json.dumps(found.as_dict(), indent=2) + "\n")
    found.require()


def main() -> None:
    """Run the command line of `pat-export verify`, to which `pat-export` hands over."""
    run_command(verify)

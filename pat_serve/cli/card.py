"""pat-export card: write an export's model card anew, with the figures that were measured since."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pat_serve.cli.app import Debug, run_command

Flag = typer.Option


def card(
    pruned: Annotated[Path, typer.Argument(help="Folder of an export.")],
    speedup: Annotated[Path | None, Flag(help="JSON of pat-bench speedup, with this model as the candidate.")] = None,
    quality: Annotated[Path | None, Flag(help="JSON of pat-eval --json.")] = None,
    debug: Debug = False,
) -> None:
    """Write README.md of an export anew, with the speed and quality that were measured since.

    Example: `pat-export card pruned/ --speedup speedup.json --quality quality.json`
    """
    from pat_serve.export.record.card_sections import rewrite_card
    from pat_serve.terminal.progress import say

    rewrite_card(pruned, speedup=speedup, quality=quality)
    say(f"{pruned / 'README.md'}: written")


def main() -> None:
    """Run the command line of `pat-export card`, to the end of the process."""
    run_command(card)

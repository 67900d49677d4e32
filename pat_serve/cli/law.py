"""pat-eval law: how much a run has still to gain, from its own held-out curve."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pat_serve.cli.app import Debug, run_command

Flag = typer.Option


def law(
    runs: Annotated[list[Path], typer.Argument(help="Training runs with evaluations, or their metrics.jsonl.")],
    target: Annotated[float | None, Flag("--target-perplexity", help="Held-out perplexity that is wanted.")] = None,
    first_part: Annotated[
        float, Flag(help="Share of the tokens that the check is fitted to; it foretells the last evaluation.")
    ] = 0.5,
    skip: Annotated[int, Flag(help="Evaluations at the start to leave out: those of the warm-up.", min=0)] = 0,
    tokens_per_step: Annotated[
        float | None, Flag(help="For runs that did not count their tokens. [default: the law counts steps]", min=1)
    ] = None,
    as_json: Annotated[bool, Flag("--json", help="Print JSON to stdout.")] = False,
    debug: Debug = False,
) -> None:
    """Fit L(D) = A + B D^-b to each run's held-out losses, and say the tokens until a target.

    Example: `pat-eval law run/ --target-perplexity 30`

    Every run is its own check: a law of its first part foretells its last evaluation. Exit code 3: the curve cannot say
    whether the target can be reached.
    """
    from pat_serve.errors import want
    from pat_serve.evaluation.law.curve import read_curve
    from pat_serve.evaluation.law.fit import LEAST_POINTS
    from pat_serve.evaluation.law.report import law_of, lines

    want("--first-part", 0 < first_part < 1, "a share between 0 and 1", first_part, "Try 0.5.")
    want("--target-perplexity", target is None or target > 1, "a number above 1", target, "Raise it.")
    curves = [read_curve(run, tokens_per_step) for run in runs]
    for curve in curves:
        most = len(curve.tokens) - LEAST_POINTS
        want("--skip", skip <= most, f"at most {most}, for {curve.name} has no more evaluations", skip, "Lower it.")
    laws = [law_of(curve, target=target, first_part=first_part, skip=skip) for curve in curves]
    if as_json:
        sys.stdout.write(json.dumps([each.model_dump() for each in laws], indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(line for each in laws for line in lines(each)) + "\n")
    unclear = any(each.target is not None and each.target.outcome == "unclear" for each in laws)
    raise typer.Exit(3 if unclear else 0)


def main() -> None:
    """Run the command line of `pat-eval law`, to the end of the process."""
    run_command(law)

"""A run's held-out curve, off its metrics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pat_serve.errors import DataError, first_line
from pat_serve.evaluation.law.fit import LEAST_POINTS, Floats
from pat_serve.run.folder import METRICS_FILE

# The name that a line of metrics gives to the tokens of all steps so far.
_TOKENS = "num_input_tokens_seen"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Held-out losses of a run.

    Attributes:
        name: of the run, as the user wrote it.
        tokens: trained on before each; steps where the run did not count its tokens.
        losses: mean negative log-likelihood of a held-out token, nats.
        unit: "tokens" or "steps".
    """

    name: str
    tokens: Floats
    losses: Floats
    unit: str

    def part(self, first: int, last: int | None = None) -> Curve:
        """The points of a slice."""
        where = slice(first, last)
        return Curve(name=self.name, tokens=self.tokens[where], losses=self.losses[where], unit=self.unit)


def read_curve(run: Path, tokens_per_step: float | None = None) -> Curve:
    """Read the evaluations of a run.

    Args:
        run: its folder, or its metrics.jsonl alone.
        tokens_per_step: for a run that did not count its tokens.

    Raises:
        DataError: the file cannot be read, or has too few evaluations for a law.
    """
    path = run / METRICS_FILE if run.is_dir() else run
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        found = [line for line in lines if "eval_loss" in line and line["step"] > 0]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            path, expected="the metrics of a training run", found=first_line(error), fix="Name the folder of a run."
        ) from error
    # The last step may be evaluated twice.
    points = {line["step"]: line for line in found}
    if len(points) < LEAST_POINTS:
        raise DataError(
            path,
            expected=f"at least {LEAST_POINTS} evaluations after the first step",
            found=str(len(points)),
            fix="Train with --eval-data or --eval-share, and a smaller --eval-steps.",
        )
    counted = all(_TOKENS in line for line in points.values())
    each = tokens_per_step or 1.0
    tokens = [float(line[_TOKENS]) if counted else step * each for step, line in points.items()]
    return Curve(
        name=str(run),
        tokens=np.asarray(tokens),
        losses=np.asarray([float(line["eval_loss"]) for line in points.values()]),
        unit="tokens" if counted or tokens_per_step else "steps",
    )

"""Cuts the candidates of a search, tunes them, and measures what they lost."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.cut.axes import HIDDEN
from pat_serve.training.assemble import assemble
from pat_serve.training.checks.prepare import Prepared, prepare
from pat_serve.training.checks.steps import with_accumulation
from pat_serve.training.checks.width import target_shape
from pat_serve.training.config import TrainRecipe
from pat_serve.training.data.encoding import Example
from pat_serve.training.methods import method_of
from pat_serve.training.model.calibration import calibration_batches, rows_at_once
from pat_serve.training.model.teacher import load_teacher
from pat_serve.training.ranks import Ranks
from pat_serve.training.search.candidates import Candidate
from pat_serve.training.search.found import with_shape
from pat_serve.training.search.measure import HeldOut

# Rows that a cut is measured on, and rows that a candidate is calibrated on; its run takes all that it is given.
_MEASURED_ROWS, _CALIBRATED_ROWS = 24, 32
# The dense model's answers are kept: a row of the vocabulary for each token.
_MEASURED_TOKENS = 4096


def resolved_for(recipe: TrainRecipe, candidate: Candidate, checkpoint: Checkpoint) -> TrainRecipe:
    """The recipe of a candidate's run, with every `auto` decided."""
    recipe = with_shape(recipe, candidate.shape).with_rate(checkpoint.hidden_size)
    method = method_of(recipe)
    return recipe.resolved(tied=checkpoint.tied, prunes=method.prunes, narrows=HIDDEN in method.axes)


class Bench:
    """Cuts and tunes candidates on the data of a run, which is read once.

    They are tuned towards the dense model alone, whatever the run's own loss is. What labels teach takes every shape
    away from the dense model, by more than shapes differ.

    Args:
        recipe: of the search.
        first: a candidate, whose sizes the pre-flight is asked about.
    """

    def __init__(self, recipe: TrainRecipe, first: Candidate) -> None:
        recipe = recipe.model_copy(update={"distillation_weight": 1.0})
        prepared = prepare(with_shape(recipe, first.shape), Ranks.join())
        data = prepared.data
        calibration = calibration_batches(data.samples[:_CALIBRATED_ROWS], rows_at_once(recipe))
        self._prepared = replace(prepared, calibration=calibration)
        # A step of the search is as large as one of the run.
        self._recipe = with_accumulation(recipe, data.rows(), 1)
        if data.held_out is not None:
            rows = data.held_out[:_MEASURED_ROWS]
        elif isinstance(data.train, list) and not recipe.packing and len(data.train) >= 2 * _MEASURED_ROWS:
            rows = data.train[-_MEASURED_ROWS:]
            self._prepared = replace(self._prepared, data=replace(data, train=data.train[:-_MEASURED_ROWS]))
        else:
            # There is nothing else: rows that every candidate has been calibrated on.
            rows = data.samples[:_MEASURED_ROWS]
        dense = load_teacher(self._prepared.checkpoint, getattr(torch, self._prepared.inputs.dtype))
        self._held_out = HeldOut.of(dense, calibration_batches(_bounded(rows), 1))

    def loss(self, candidate: Candidate, steps: int) -> tuple[float, float]:
        """Cut a candidate, tune it, and measure: its KL in nats a token, and the seconds that the steps took."""
        with tempfile.TemporaryDirectory() as folder:
            job = assemble(self._prepared_for(candidate, steps), Path(folder), Ranks.join(), resumes=False)
            began = time.monotonic()
            if steps:
                arguments = job.trainer.args
                arguments.save_strategy = arguments.eval_strategy = "no"
                try:
                    job.trainer.train()
                finally:
                    job.display.close()
            seconds = time.monotonic() - began
            return self._held_out.losses(job.trainer.model)[1], seconds

    def _prepared_for(self, candidate: Candidate, steps: int) -> Prepared:
        checkpoint = self._prepared.checkpoint
        recipe = resolved_for(self._recipe, candidate, checkpoint)
        # Candidates see fewer rows than the run will, and need not say so each.
        recipe = recipe.model_copy(update={"calibration_rows": len(self._prepared.data.samples)})
        method = method_of(recipe)
        inputs = self._prepared.inputs.model_copy(
            update={
                "shape": target_shape(recipe, checkpoint),
                "total_steps": steps,
                "narrow": method.stays_wide(recipe) is None,
                "keeps_tie": recipe.keeps_tie,
            }
        )
        return replace(self._prepared, recipe=recipe, inputs=inputs)


def _bounded(rows: Sequence[Example]) -> list[Example]:
    """The first rows, as far as their tokens that count are few enough; one row at least."""
    taken: list[Example] = []
    tokens = 0
    for row in rows:
        tokens += sum(label >= 0 for label in row["labels"])
        if taken and tokens > _MEASURED_TOKENS:
            break
        taken.append(row)
    return taken

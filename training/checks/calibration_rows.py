"""Check that the training data have the rows that a run is to measure on."""

from __future__ import annotations

from pat_serve.errors import UsageError
from pat_serve.training.config import LEAST_CALIBRATION_ROWS, TrainRecipe
from pat_serve.training.data.calibration_samples import FEWEST_ROWS
from pat_serve.training.methods import method_of


def require_calibration_rows(recipe: TrainRecipe, found: int) -> None:
    """Check that the data have the rows that were asked for; a default takes what there is, where something is trained.

    Raises:
        UsageError: they have fewer.
    """
    method = method_of(recipe)
    if not method.wants_batches(recipe) or (method.trains and not recipe.asks_for_rows):
        return
    if found < (wanted := recipe.calibration_rows or FEWEST_ROWS):
        raise UsageError(
            "--calibration-rows",
            expected=f"at most {found}, the rows of --data {recipe.data}",
            found=str(wanted),
            fix=f"Give --calibration-rows {found}, or data with more rows."
            if found >= LEAST_CALIBRATION_ROWS
            else f"Give data with at least {LEAST_CALIBRATION_ROWS} rows.",
        )

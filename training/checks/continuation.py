"""Look at the files of an interrupted run, and check that it is the requested run."""

from __future__ import annotations

import shutil
from enum import Enum
from pathlib import Path

from pat_serve.errors import OutputExists, RunError, UsageError
from pat_serve.run.folder import (
    ADAPTER_FOLDER,
    END_TOKENS_FILE,
    INPUTS_FILE,
    METRICS_FILE,
    PARITY_PROMPTS_FILE,
    RECIPE_FILE,
)
from pat_serve.run.plan import PLAN_ARRAYS, PLAN_JSON
from pat_serve.training.config import AXES_OF_TIED, LEAST_LAYERS, TrainRecipe
from pat_serve.training.presets import FORMER_CALIBRATION_ROWS
from pat_serve.training.recipe_file import read_recipe


class RunState(Enum):
    """How far a run has come."""

    ABSENT = "absent"
    UNFINISHED = "unfinished"
    FINISHED = "finished"


def state_of(run: Path) -> RunState:
    """Look at a run's folder.

    Raises:
        OutputExists: the folder holds something else.
    """
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return RunState.ABSENT
    if not (run / RECIPE_FILE).is_file():
        raise OutputExists(
            f"--out {run}",
            expected=f"no such path, or a run with {RECIPE_FILE}",
            found="a folder with something else" if run.is_dir() else "a file",
            fix="Choose another path.",
        )
    return RunState.FINISHED if (run / PLAN_JSON).is_file() else RunState.UNFINISHED


def require_unfinished(run: Path) -> None:
    """Refuse to resume a run that cannot be resumed.

    Raises:
        RunError: the folder holds no run, or a finished one.
    """
    if not (run / RECIPE_FILE).is_file():
        raise RunError(run, expected="a run with recipe.yaml", found="none", fix="Start one with pat-train --out.")
    if (run / PLAN_JSON).is_file():
        raise RunError(run, expected="an unfinished run", found="a finished one", fix="Export it with pat-export.")


def saved_recipe(run: Path) -> TrainRecipe:
    """Read the recipe that a run began with."""
    return TrainRecipe.build(read_recipe(run / RECIPE_FILE), str(run / RECIPE_FILE))


def require_same_recipe(run: Path, recipe: TrainRecipe) -> None:
    """Compare the settings of now with those of the run.

    Raises:
        UsageError: settings differ; the message names them all.
    """
    saved = saved_recipe(run)
    if saved.axes == AXES_OF_TIED:
        # The run has named them, where the settings did not.
        recipe = recipe.with_axes(tied=True, layers=LEAST_LAYERS)
    if recipe.learning_rate is None:
        # The run has named its rate, too. An older version's run has the rate that was the default then.
        recipe = recipe.model_copy(update={"learning_rate": saved.learning_rate})
    if recipe.gradient_accumulation_steps is None:
        # The run has named how many micro-batches make a step, too.
        recipe = recipe.model_copy(update={"gradient_accumulation_steps": saved.gradient_accumulation_steps})
    if recipe.calibration_rows is None and saved.calibration_rows == FORMER_CALIBRATION_ROWS:
        # The run is of an older version, which wrote its default into the recipe.
        recipe = recipe.model_copy(update={"calibration_rows": saved.calibration_rows})
    old, new = saved.model_dump(), recipe.model_dump()
    changed = [name for name in new if old[name] != new[name]]
    if changed:
        raise UsageError(
            f"--resume auto --out {run}",
            expected="the settings that the run began with: " + ", ".join(f"{name} {old[name]}" for name in changed),
            found=", ".join(str(new[name]) for name in changed),
            fix="Give the same settings, or another --out.",
        )


def clear_leftovers(run: Path) -> None:
    """Delete partial files that a crash left beside their targets."""
    names = (RECIPE_FILE, INPUTS_FILE, METRICS_FILE, PARITY_PROMPTS_FILE, END_TOKENS_FILE, ADAPTER_FOLDER)
    for name in (*names, PLAN_JSON, PLAN_ARRAYS):
        for leftover in run.glob(f".{name}.*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

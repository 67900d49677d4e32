"""Train a variant under study and export it, as a user does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


def train_and_export(settings: dict[str, Any], name: str, run: Path, out: Path) -> dict[str, Any]:
    """Train and export; earlier folders are replaced.

    Args:
        settings: settings of the recipe.
        name: name of the recipe, for its errors.
        run: folder of the run.
        out: folder of the checkpoint.

    Returns:
        width, parameters, seconds of the training, and how far the export is from the trained model.
    """
    from pat_serve.training.config import TrainRecipe
    from pat_serve.training.run import start

    began = time.monotonic()
    start(TrainRecipe.build(settings, name), run, force=True)
    trained_s = time.monotonic() - began
    return export(run, out) | {"train_s": round(trained_s, 1)}


def export(run: Path, out: Path) -> dict[str, Any]:
    """Export a finished run; an earlier folder at `out` is replaced.

    Returns:
        width, parameters, and how far the export is from the trained model.
    """
    from pat_serve.export.exporter import export_run

    exported = export_run(run, out, force=True)
    assert exported.parity is not None
    return {
        "hidden_size": exported.record["hidden_size"]["exported"],
        "parameters": exported.record["parameters"]["exported"],
        "parity_max_abs_over_std": exported.parity.max_abs_over_std,
    }

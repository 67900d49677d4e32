"""The folder of a run before its first step: what a resumption begins with."""

from __future__ import annotations

from pathlib import Path

from pat_serve.files.atomic import new_folder
from pat_serve.run.replaced import STARTED, started_files, write_replaced
from pat_serve.training.assemble import Job
from pat_serve.training.checks.prepare import Prepared
from pat_serve.training.model.choice_file import CHOICE_FILE, replaced_weights, save_choice
from pat_serve.training.search.found import Search


def begin(prepared: Prepared, run: Path) -> None:
    """Make the folder of a run that keeps what it finds on its way: a one-shot's layers, a search's scores."""
    with new_folder(run) as staging:
        prepared.inputs.save(staging)
        prepared.asked.save(staging)


def lay_out(prepared: Prepared, job: Job, run: Path, found: Search | None = None) -> None:
    """Make the run's folder; it appears with all that a resumption needs in it."""
    with new_folder(run) as staging:
        prepared.inputs.save(staging)
        prepared.asked.save(staging)
        if found is not None:
            found.save(staging)
        if job.method.calibration is not None:
            job.method.calibration.save(staging)
        save_start(job, staging)


def save_start(job: Job, folder: Path) -> None:
    """Write what was decided and made up for before the first step; the choice comes last, and says that all is there.

    Args:
        job: ready for its first step.
        folder: of the run.
    """
    weights = replaced_weights(job.trainer.model, job.method, job.ready.replaced)
    write_replaced(folder, weights, STARTED)
    save_choice(folder, job.method.chosen)


def clear_half_start(run: Path) -> bool:
    """Delete what an interrupted search has written of its start, unless it is whole; True if there is no start now."""
    if (run / CHOICE_FILE).is_file():
        return False
    for path in started_files(run):
        path.unlink()
    return True

"""Give a report its date, versions and machine."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from pat_serve.evaluation.report import BoundResult, Measure, Model, Report
from pat_serve.machine.hardware import describe
from pat_serve.version import __version__


def new_report(models: Sequence[Model], measures: Sequence[Measure], gate: Sequence[BoundResult] = ()) -> Report:
    """Make a report of figures that this machine has just measured."""
    return Report(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        pat_serve=__version__,
        machine=describe(),
        models=list(models),
        measures=list(measures),
        gate=list(gate),
    )

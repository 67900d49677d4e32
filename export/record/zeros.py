"""The zeros that a plan promises, counted in an export's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pat_serve.checkpoints.shards import read_tensors
from pat_serve.cut.pattern import Pattern
from pat_serve.errors import BrokenPlan
from pat_serve.export.run.reader import Run
from pat_serve.run.plan import PLAN_JSON
from pat_serve.terminal.progress import track


def count_zeros(run: Run, folder: Path) -> dict[str, Any] | None:
    """Share of zeros in the modules of the plan's `sparsity`, and the pattern that each weight holds.

    Args:
        run: the run.
        folder: the export, with its weights written.

    Returns:
        the record's `sparsity`; None where the plan promises no zeros.

    Raises:
        BrokenPlan: a weight has not the zeros of its pattern.
    """
    promised = run.plan.sparsity
    if not promised:
        return None
    tensors = read_tensors(folder, folder, lambda _: False)
    zeros = numbers = 0
    for module, pattern in track(promised.items(), "count zeros", len(promised)):
        weight_OI = tensors[f"{module}.weight"].read()
        zeros += int((weight_OI == 0).sum())
        numbers += weight_OI.numel()
        if not Pattern.parse(pattern).held_by(weight_OI):
            raise BrokenPlan(
                PLAN_JSON,
                expected=f"zeros of pattern {pattern} in {module}",
                found="a group with more numbers in the exported weight",
                fix="Repeat the training.",
            )
    patterns = sorted(set(promised.values()))
    return {"pattern": ", ".join(patterns), "modules": len(promised), "zeros": zeros, "numbers": numbers}

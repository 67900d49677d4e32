"""A table of parity figures, family by cut, in Markdown: the largest logit difference over the logits' deviation.

Example: python -m benchmarks.parity_axes

Each base is a small random model of four layers, each run a random plan and a random adapter. Every export is measured
in memory and layer by layer, in float32. The larger of the two figures stands in the table.
"""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

from pat_serve.export.exporter import export_run
from pat_serve.export.parity.gate import measure_parity
from pat_serve.export.run.reader import open_run
from pat_serve.families.architectures import FAMILIES
from pat_serve.machine.hardware import describe
from tests.test_export_axes import SHAPES, make_run


def main() -> None:
    """Measure every cell and print the table line by line."""
    machine = describe()
    print(f"{datetime.now(UTC).date().isoformat()}, {machine['cpu_model']}, torch {machine['torch']}.\n")
    print(f"| cut | kept | {' | '.join(FAMILIES)} |")
    print("|---" * (2 + len(FAMILIES)) + "|")
    for shape, counts in SHAPES.items():
        kept = ", ".join(f"{axis} {count}" for axis, count in counts.items())
        cells = " | ".join(f"{_measure(model_type, counts):.1e}" for model_type in FAMILIES)
        print(f"| {shape} | {kept} | {cells} |", flush=True)


def _measure(model_type: str, counts: dict[str, int]) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        run = make_run(Path(scratch), model_type, counts)
        done = export_run(run, Path(scratch) / "out", walk=False)
        walked = measure_parity(open_run(run), done.out, torch.float32, walk=True)
    assert done.parity is not None
    assert done.parity.passed
    assert walked.passed
    return max(done.parity.max_abs_over_std, walked.max_abs_over_std)


if __name__ == "__main__":
    main()

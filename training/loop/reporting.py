"""Where a run's figures go besides metrics.jsonl: TensorBoard, and the other integrations of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    TensorBoardCallback,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)

from pat_serve.errors import MissingExtra
from pat_serve.training.config import TENSORBOARD
from pat_serve.training.methods import Method

_INSTALLED: dict[str, Callable[[], bool]] = {
    TENSORBOARD: is_tensorboard_available,
    "wandb": is_wandb_available,
    "trackio": is_trackio_available,
}


def check_reporters(names: Sequence[str]) -> None:
    """All of them can be imported.

    Raises:
        MissingExtra: one cannot.
    """
    for name in names:
        if not _INSTALLED[name]():
            raise MissingExtra(
                f"--report-to {name}",
                expected=f"the package {name}",
                found="not installed",
                fix=f"Run pip install {name}, or leave it out.",
            )


def tensorboard_callbacks(folder: Path, method: Method, *, writes: bool, done_steps: int) -> list[TrainerCallback]:
    """Scalars of every log line, and the method's distributions; all ranks need them, and one of them writes.

    Args:
        folder: of the event files.
        method: has the distributions.
        writes: this rank writes.
        done_steps: optimizer steps before this start of the run. Lines that an earlier start wrote beyond them are
            taken back, as in metrics.jsonl, because those steps are made again.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder, purge_step=done_steps + 1) if writes else None
    return [Histograms(writer, method), *([TensorBoardCallback(writer)] if writes else [])]


class Histograms(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by mypy
    """Writes the method's distributions to TensorBoard with every line of training metrics."""

    def __init__(self, writer: Any, method: Method) -> None:
        self.writer = writer
        self.method = method

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one histogram for each distribution."""
        if logs and "cross_entropy" in logs:
            # Asked on every rank, since each may hold a shard of the mask.
            histograms = self.method.histograms()
            for name, values in histograms.items() if self.writer is not None else ():
                self.writer.add_histogram(name, values, state.global_step)

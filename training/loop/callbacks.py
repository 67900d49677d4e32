"""Callbacks around a training step: the method's clock, the metrics file and the display."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pat_serve.files.atomic import write_text
from pat_serve.run.folder import METRICS_FILE
from pat_serve.terminal.progress import console, progress_bar
from pat_serve.training.methods import Method


class MethodClock(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by mypy
    """Tells the method which optimizer step comes next, from 0; right after a resume too."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called once an optimizer step, before its first micro-batch."""
        self.method.on_step(state.global_step)


class StepTimer(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by mypy
    """Adds up the seconds spent in optimizer steps: not those of an evaluation or of a checkpoint."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.began_s = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the step's clock before the first micro-batch."""
        self.began_s = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the step's clock after the optimizer."""
        self.seconds += time.perf_counter() - self.began_s

    def take_s(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


_TOTALS_ALONE = ("train_runtime", "train_tokens_per_second")


class MetricsFile(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by mypy
    """Appends every log line to metrics.jsonl; a resumed run first drops the lines that it will write again."""

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS_FILE

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the step that training resumes from."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        # A run that stopped after its last step has its totals already, and writes them again.
        kept = [line for line in lines if _step(line) <= state.global_step and '"train_loss"' not in line]
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """One JSON object a line; the last one, at the end of training, has the totals."""
        if state.is_world_process_zero and logs:
            if "train_loss" not in logs:
                # Counting tokens makes the Trainer add the time of the whole run so far to every line.
                logs = {name: figure for name, figure in logs.items() if name not in _TOTALS_ALONE}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
                file.flush()
                os.fsync(file.fileno())  # or a checkpoint could outlive the lines before it


class LossesSoFar(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by mypy
    """Restores the means of a resumed run once the Trainer has reset them.

    Args:
        restore: the trainer's `restore_losses`.
        checkpoint: what the run is resumed from.
    """

    def __init__(self, restore: Callable[[Path], None], checkpoint: Path) -> None:
        self.restore = restore
        self.checkpoint = checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after the reset and before the first step."""
        self.restore(self.checkpoint)


class Display(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by mypy
    """A progress bar with loss, gate, speed and time left; silent when stderr is no terminal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.context: Any = None
        self.progress: Progress | None = None
        self.task = TaskID(0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the progress bar of the run."""
        if state.is_world_process_zero and console.is_terminal:
            self.context = progress_bar()
            self.progress = self.context.__enter__()
            self.task = self.progress.add_task(self.title, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the progress bar by a step."""
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the logged figures beside the bar."""
        if self.progress is not None and logs and "cross_entropy" in logs:
            self.progress.update(self.task, description=progress_line(self.title, logs))

    def close(self) -> None:
        """Take the bar away, also after an error."""
        if self.context is not None:
            self.context.__exit__(None, None, None)
            self.context = None
            self.progress = None


def progress_line(title: str, logs: dict[str, float]) -> str:
    """The text before the progress bar, from a line of metrics."""
    figures = [f"loss {logs['cross_entropy']:.3f}"]
    if "gate_kept" in logs:
        figures.append(f"{logs['gate_kept']:.0f} channels kept")
    if "tokens_per_second" in logs:
        figures.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    return f"{title}: {', '.join(figures)}"


def _step(line: str) -> float:
    """A line's step; a line that a crash tore counts as later than all others."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")

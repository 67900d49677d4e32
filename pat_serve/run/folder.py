"""The layout of run/, a training run's folder: the files that training writes and an export reads beside the plan."""

from __future__ import annotations

from pathlib import Path

RECIPE_FILE = "recipe.yaml"
INPUTS_FILE = "inputs.json"
METRICS_FILE = "metrics.jsonl"
PARITY_PROMPTS_FILE = "parity_prompts.jsonl"
END_TOKENS_FILE = "end_tokens.json"
ADAPTER_FOLDER = "adapter"
WEIGHTS_FOLDER = "weights"
CHECKPOINTS_FOLDER = "checkpoints"
TENSORBOARD_FOLDER = "tensorboard"


def checkpoint_step(checkpoint: Path) -> int:
    """Read the optimizer step from a checkpoint's name, checkpoints/step-N."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """List a run's complete checkpoints, oldest first."""
    found = [path for path in (run / CHECKPOINTS_FOLDER).glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=checkpoint_step)

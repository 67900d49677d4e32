"""Write the exported model of a run: its config.json, weights and index."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from pat_serve.checkpoints.shard_layout import index_document
from pat_serve.export.files.writer import WeightFiles, write_blocks
from pat_serve.export.rewrite.blocks import Rewriting
from pat_serve.export.rewrite.config import exported_config
from pat_serve.export.run.reader import Run
from pat_serve.terminal.progress import byte_progress


def write_model(
    run: Run,
    folder: Path,
    file_dtype: torch.dtype,
    max_shard_bytes: int,
    model_dtype: torch.dtype | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    *,
    stochastic: bool = False,
) -> dict[str, str]:
    """Write config.json, the weights and their index.

    Args:
        run: the run.
        folder: an empty folder.
        file_dtype: of the weights.
        max_shard_bytes: size of a weight file at most.
        model_dtype: dtype in which the model will run; `file_dtype` by default.
        meanwhile: called between blocks; what it raises ends the writing.
        stochastic: round by chance, and not to the nearest value.

    Returns:
        SHA-256 of the weight files by name.
    """

    def advance(done_bytes: int) -> None:
        show(done_bytes)
        meanwhile()

    rewriting = Rewriting(run, file_dtype, model_dtype, stochastic=stochastic)
    shapes = rewriting.shapes
    total_bytes = sum(prod(shape) for shape in shapes.values()) * file_dtype.itemsize
    with (
        WeightFiles(folder, shapes, file_dtype, max_shard_bytes) as files,
        byte_progress(f"write {dtype_name(file_dtype)} weights", total_bytes) as show,
    ):
        write_blocks(files, shapes, rewriting.blocks, advance)
    config = json.dumps(exported_config(run, file_dtype), indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    if len(files.shards) > 1:
        document = json.dumps(index_document(files.shards, shapes, file_dtype), indent=2)
        (folder / "model.safetensors.index.json").write_text(document + "\n", encoding="utf-8")
    return files.sha256


def remove_weights(folder: Path) -> None:
    """Take a written model's weights and their index away, so that they can be written again."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as config.json does: `float32`, `bfloat16`."""
    return str(dtype).removeprefix("torch.")

"""Checks before a walk over the layers that trains nothing: processes and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from math import prod

import torch

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.errors import TooLarge, UsageError
from pat_serve.machine.hardware import available_memory_bytes
from pat_serve.terminal.progress import say
from pat_serve.training.checks.memory import BatchSize
from pat_serve.training.checks.preflight import OVERHEAD_BYTES, Preflight
from pat_serve.training.config import TrainRecipe
from pat_serve.training.ranks import Ranks

# Square matrices of a linear's inputs in float32, at once: the second moment and its factor.
_SQUARES = 2
# Copies of a linear's weight in float32, at once: as stored, with zeros, and a product of them.
_COPIES = 3


def require_one_process(recipe: TrainRecipe, ranks: Ranks) -> None:
    """Raises: UsageError, where several processes are to share what one does alone."""
    if ranks.count > 1:
        raise UsageError(
            f"--method {recipe.method}",
            expected="one process, since a layer waits for the one before it",
            found=f"{ranks.count} processes",
            fix="Start it without accelerate launch and torchrun.",
        )


def walk_bytes(checkpoint: Checkpoint, dtype: torch.dtype, batches: Sequence[BatchSize]) -> int:
    """Memory of the walk at its largest, counted from the checkpoint's headers.

    Args:
        checkpoint: the base.
        dtype: of the computation.
        batches: of the calibration.
    """
    sizes, width = checkpoint.sizes, dtype.itemsize
    linears = [
        (entry.shape, entry.size_bytes)
        for name, entry in checkpoint.tensors.items()
        if checkpoint.family.match(name)[0].lora and len(entry.shape) == 2
    ]
    layer_numbers = sum(prod(shape) for shape, _ in linears) // sizes.layers
    # The new weights are kept until they are written; the layer computes with the same tensors where it can.
    layer_stored = 0 if checkpoint.dtype == dtype else sum(stored for _, stored in linears) // sizes.layers
    at_work = max(4 * (_SQUARES * shape[1] ** 2 + _COPIES * prod(shape)) for shape, _ in linears)
    tokens = sum(size.tokens for size in batches)
    streams = tokens * sizes.hidden * width
    # Rows of the embedding that the calibration uses, as stored and in the computation's dtype.
    streams += min(tokens, sizes.vocab) * sizes.hidden * (width + checkpoint.dtype.itemsize)
    largest = max(size.tokens for size in batches)
    branch = largest * (4 * sizes.hidden * 4 + max(4 * sizes.heads * sizes.head_dim, 4 * sizes.ffn) * max(width, 4))
    # A layer in the computation's dtype, and its new weights.
    return streams + layer_numbers * width + layer_stored + max(at_work, branch)


def check_walk_memory(
    checkpoint: Checkpoint, recipe: TrainRecipe, dtype: str, batches: Sequence[BatchSize]
) -> Preflight:
    """Report what the walk needs, and refuse one that cannot fit.

    Raises:
        TooLarge: more than there is, unless the recipe skips the check.
    """
    needed = walk_bytes(checkpoint, getattr(torch, dtype), batches)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    available = torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory_bytes()
    tokens = sum(size.tokens for size in batches)
    say(
        f"preflight: {checkpoint.num_layers} layers one after the other on {tokens:,} positions; expects "
        f"{(needed + OVERHEAD_BYTES) / 1e9:.2f} of {available / 1e9:.2f} GB available on {device}"
    )
    if needed + OVERHEAD_BYTES > available and not recipe.skip_preflight:
        raise TooLarge(
            f"--method {recipe.method}",
            expected=f"at most {available / 1e9:.2f} GB, which {device} has left",
            found=f"{(needed + OVERHEAD_BYTES) / 1e9:.2f} GB",
            fix="Lower --calibration-rows, --max-length-tokens or --batch-size, or override this estimate with "
            "--skip-preflight.",
        )
    # Nothing is trained: whatever else a training counts is none.
    nothing = {field.name: 0 for field in fields(Preflight)}
    base = sum(prod(entry.shape) for entry in checkpoint.tensors.values())
    return Preflight(**nothing | {"base_parameters": base, "preparing_bytes": needed})

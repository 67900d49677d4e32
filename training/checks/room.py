"""The room that a run takes on its disk, counted before its model is loaded, and the way out where there is none.

tests/test_full_disk.py compares the count with what runs leave.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from pat_serve.cut.axes import HIDDEN, LAYERS
from pat_serve.cut.cuts import Cuts
from pat_serve.families.architectures import HEAD
from pat_serve.files.disk import check_room
from pat_serve.machine.hardware import DTYPE_BYTES
from pat_serve.run.folder import checkpoint_step, list_checkpoints
from pat_serve.training.checks.memory import unties
from pat_serve.training.checks.prepare import Prepared
from pat_serve.training.methods import method_of
from pat_serve.training.model.weights import ALL, LORA, trained_modules

# A trained float32 number and Adam's two moments of it, with what the files say about each tensor.
_CHECKPOINT_BYTES = 12.25
# Random states, schedulers and the Trainer's own, in each checkpoint; recipe, prompts and plan.json, once.
_SMALL_FILES_BYTES = 80_000
# A line of metrics.jsonl, its copy in a checkpoint's state, and TensorBoard's, which also keeps distributions.
_LINE_BYTES = 25_000


def run_bytes(prepared: Prepared) -> tuple[int, int, int]:
    """The room on the disk that a run takes at its largest.

    Returns:
        checkpoints at once, one's bytes, and the bytes of all else.
    """
    recipe, size, inputs = prepared.recipe, prepared.preflight, prepared.inputs
    written = math.ceil(inputs.total_steps / recipe.save_steps)
    # A checkpoint is complete before the oldest goes.
    at_once = min(written, recipe.keep_checkpoints + 1)
    checkpoint = round(size.trained_parameters * _CHECKPOINT_BYTES) + _SMALL_FILES_BYTES
    # The rotation is there twice: measured, and in the plan.
    rotations = 2 if method_of(recipe).prunes and recipe.rotate != "none" else 0
    # Replaced weights, in the base's shapes: as they begin, and as they are trained.
    replaced = _replaced_bytes(prepared) + _tuned_bytes(prepared)
    result = (
        replaced + size.wide_parameters * 4 + rotations * prepared.checkpoint.hidden_size**2 * 4 + _SMALL_FILES_BYTES
    )
    lines = math.ceil(inputs.total_steps / recipe.logging_steps) + 2
    tokenizer = sum(path.stat().st_size for path in prepared.checkpoint.folder.glob("tokenizer*") if path.is_file())
    return at_once, checkpoint, result + lines * _LINE_BYTES + tokenizer


def _replaced_bytes(prepared: Prepared) -> int:
    """Bytes of the weights that a full refit replaces: at most those of all layers that stay, and the head."""
    recipe, checkpoint = prepared.recipe, prepared.checkpoint
    if not method_of(recipe).trains:
        # Every linear of every layer, in the base's dtypes.
        linears = (name for name in checkpoint.tensors if checkpoint.family.match(name)[0].lora)
        return sum(checkpoint.tensors[name].size_bytes for name in linears)
    if not method_of(recipe).adapts:
        linears = (name for name in checkpoint.tensors if checkpoint.family.match(name)[0].lora)
        return sum(4 * math.prod(checkpoint.tensors[name].shape) for name in linears)
    if not (recipe.compensate and recipe.refit == "full"):
        return 0
    shape = prepared.inputs.shape
    sizes = replace(checkpoint.sizes, layers=shape.get(LAYERS, checkpoint.sizes.layers))
    narrows = shape[HIDDEN] < checkpoint.hidden_size
    numbers = 0
    for name, spec, layer in checkpoint.family.modules(sizes.layers):
        stays_tied = name == HEAD and checkpoint.tied and not unties(checkpoint, recipe)
        reads = narrows and spec.norm is not None and not stays_tied
        writes = layer is not None and spec.writes_residual
        numbers += math.prod(spec.shape("weight", checkpoint.sizes)) if reads or writes else 0
    return numbers * DTYPE_BYTES[prepared.inputs.dtype]


def _tuned_bytes(prepared: Prepared) -> int:
    """Bytes of the weights that a run without an adapter leaves: trained ones in float32, refitted ones once more."""
    recipe, checkpoint = prepared.recipe, prepared.checkpoint
    if recipe.train == LORA:
        return 0
    sizes = replace(checkpoint.sizes, layers=prepared.inputs.shape.get(LAYERS, checkpoint.sizes.layers))
    tied = checkpoint.tied and not unties(checkpoint, recipe)
    numbers = 0
    for name in trained_modules(recipe.train, checkpoint.family, Cuts(), sizes, tied=tied):
        spec, _, kind = checkpoint.family.match(f"{name}.weight")
        numbers += math.prod(spec.shape(kind, checkpoint.sizes))
    return numbers * 4 + (_replaced_bytes(prepared) if recipe.train != ALL else 0)


def check_disk(prepared: Prepared, run: Path) -> None:
    """The disk has room for the run, but for what of it is there already; skipped with the rest of the preflight.

    Raises:
        DiskFull: it has not.
    """
    if prepared.recipe.skip_preflight:
        return
    at_once, checkpoint, rest = run_bytes(prepared)
    there = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    check_room(
        run,
        max(0, at_once * checkpoint + rest - there),
        "Free some space, choose another --out, or write fewer and keep fewer: --save-steps, --keep-checkpoints.",
        what=f"{at_once} checkpoints of {checkpoint / 1e6:.1f} MB and what the run leaves",
    )


def way_on(run: Path) -> str:
    """Tell how to go on when the disk was full under a run."""
    if not run.is_dir():
        return "Free some space, or choose another --out; nothing was left behind."
    checkpoints = list_checkpoints(run)
    reached = f"from step {checkpoint_step(checkpoints[-1])}" if checkpoints else "from its start"
    return f"Free some space and go on with pat-train --resume {run}, {reached}."

"""The needs of a training, told before a weight is loaded, from the checkpoint's headers and a model without storage.

The bytes are counted, not measured (memory.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.cut.axes import HIDDEN
from pat_serve.errors import TooLarge
from pat_serve.machine.hardware import DTYPE_BYTES, available_memory_bytes
from pat_serve.shapes.parameters import parameters_at
from pat_serve.terminal.progress import say
from pat_serve.training.checks.memory import (
    BatchSize,
    dense_bytes_per_token,
    preparing_bytes,
    tuning_bytes_per_token,
    unties,
    weights_bytes,
)
from pat_serve.training.checks.trained import teacher_share, trained_parameters
from pat_serve.training.config import LEAST_CALIBRATION_ROWS, TrainRecipe
from pat_serve.training.methods import method_of
from pat_serve.training.model.teacher import holds_teacher
from pat_serve.training.model.weights import HEAD_AND_LAST, LAST_LAYERS, LORA
from pat_serve.training.ranks import sharded_by_fsdp

# A float32 weight, its gradient and Adam's two moments.
TRAINED_BYTES = 16
# Threads' buffers and kernels that a first step brings along.
OVERHEAD_BYTES = 100_000_000
# glibc serves smaller blocks from a heap, where what is kept pins what is freed around it; larger ones mapped alone.
# The largest loss that was measured, as a share of activations and logits (hidden 512, 4 layers, batches of 2 to 16).
HEAP_BLOCK_BYTES = 32 * 2**20
HEAP_LOSS = 2 / 3


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """A training's size.

    Attributes:
        base_parameters: frozen ones, of the base, at the width that is trained.
        lora_parameters: trained ones, of the adapter.
        tuned_parameters: trained ones of the model itself, where they are trained in LoRA's place.
        method_parameters: trained ones, of the method's modules (HSMs and mask), and the stream's norms.
        wide_parameters: trained ones before the base is cut, whose shapes a run's adapter and plan have.
        weights_bytes: the base in the training's dtype, as wide as it is trained; under FSDP one process's share and a
            layer in full.
        trained_bytes: what is trained in float32, its gradients and Adam's moments; under FSDP one process's share.
        activations_bytes: what the backward pass needs of one micro-batch.
        logits_bytes: of one micro-batch, with log-probabilities and gradients.
        allocator_bytes: what a CPU's heap loses between small activations.
        teacher_bytes: the dense base that a distillation holds beside the model; whole in every process.
        teacher_share: the teacher's part of a step's multiplications, counted; 0 where nothing is distilled.
        tokens_per_step: of one optimizer step over all processes, at most.
        preparing_bytes: what calibration and compensation take before training, of the wide base in every process: its
            weights, and the most of what one batch's measure keeps, what turning the largest weight takes, and the
            adapter with the states of all calibration rows and the largest weight's change. 0 where the method does
            neither, and on a GPU under FSDP, whose processes prepare in the host's memory.
    """

    base_parameters: int
    lora_parameters: int
    tuned_parameters: int
    method_parameters: int
    wide_parameters: int
    weights_bytes: int
    trained_bytes: int
    activations_bytes: int
    logits_bytes: int
    allocator_bytes: int
    teacher_bytes: int
    teacher_share: float
    tokens_per_step: int
    preparing_bytes: int

    @property
    def trained_parameters(self) -> int:
        """All of what is trained."""
        return self.lora_parameters + self.tuned_parameters + self.method_parameters

    @property
    def total_bytes(self) -> int:
        """The most that is needed at once, for one process."""
        batch = self.activations_bytes + self.logits_bytes + self.allocator_bytes
        training = self.weights_bytes + self.trained_bytes + self.teacher_bytes + batch
        return max(training, self.preparing_bytes) + OVERHEAD_BYTES

    def report(self, available_bytes: int, device: str) -> None:
        """Tell the user parameters, memory and its parts, in a few lines on stderr."""
        tuned = f"weights {_count(self.tuned_parameters)}" if self.tuned_parameters else ""
        say(
            f"preflight: {_count(self.base_parameters)} parameters, {_count(self.trained_parameters)} trained ("
            f"{tuned or f'LoRA {_count(self.lora_parameters)}'}, method {_count(self.method_parameters)}); at most "
            f"{self.tokens_per_step:,} tokens a step"
        )
        room = f"{_gb(self.total_bytes)} of {_gb(available_bytes)} available on {device}"
        say(f"preflight: expects {room}: {self.parts()}")
        if self.teacher_share:
            say(f"preflight: the teacher, a forward pass, counts for {self.teacher_share:.0%} of a step's work")

    def parts(self) -> str:
        """Name the parts of the memory in one line, in GB."""
        return (
            f"weights {_gb(self.weights_bytes)}, trained with gradients and Adam moments {_gb(self.trained_bytes)}, "
            f"activations {_gb(self.activations_bytes)}, logits {_gb(self.logits_bytes)}, "
            f"allocator {_gb(self.allocator_bytes)}"
            + (f", teacher {_gb(self.teacher_bytes)}" if self.teacher_bytes else "")
            + (f"; before the first step {_gb(self.preparing_bytes)}" if self.preparing_bytes else "")
        )


def check_memory(
    checkpoint: Checkpoint,
    recipe: TrainRecipe,
    dtype: str,
    shape: Mapping[str, int],
    total_steps: int,
    longest_tokens: int,
    calibration: Sequence[BatchSize],
) -> Preflight:
    """Report what the training needs, and refuse one that cannot fit. The arguments are those of `estimate_training`.

    Raises:
        TooLarge: more than there is, unless the recipe skips the check.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    estimate = estimate_training(checkpoint, recipe, dtype, shape, total_steps, longest_tokens, device, calibration)
    if device == "cuda":
        available = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))[0]
    else:
        available = available_memory_bytes()
    method = method_of(recipe)
    wide = method.stays_wide(recipe)
    if method.prunes:
        channels = f"{shape[HIDDEN]} of {checkpoint.hidden_size}" if wide is None else f"all {checkpoint.hidden_size}"
        say(f"preflight: trains {channels} channels" + (f", since {wide}" if wide else ""))
    estimate.report(available, device)
    if not recipe.skip_preflight:
        require_room(estimate, available, device, recipe, dtype)
    return estimate


def require_room(estimate: Preflight, available_bytes: int, device: str, recipe: TrainRecipe, dtype: str) -> None:
    """Raises: TooLarge, when the estimate is more than there is; it names what this recipe has not used yet."""
    if estimate.total_bytes > available_bytes:
        preparing = 0 < estimate.preparing_bytes > available_bytes - OVERHEAD_BYTES
        training = estimate.total_bytes > estimate.preparing_bytes + OVERHEAD_BYTES or not preparing
        ways = {
            "lower --batch-size and raise --gradient-accumulation-steps": training and recipe.batch_size > 1,
            "lower --max-length-tokens": True,
            f"lower --calibration-rows {recipe.calibration_rows}, for what comes before the first step": preparing
            and (recipe.calibration_rows or 0) > LEAST_CALIBRATION_ROWS,
            "add --gradient-checkpointing": training and not recipe.gradient_checkpointing,
            "take --dtype bfloat16": dtype == "float32",
            "override this estimate with --skip-preflight": True,
        }
        *first, last = (way for way, helps in ways.items() if helps)
        fix = f"{', '.join(first)}, or {last}."
        raise TooLarge(
            "the training",
            expected=f"at most {_gb(available_bytes)}, which {device} has left",
            found=f"{_gb(estimate.total_bytes)} ({estimate.parts()})",
            fix=fix[0].upper() + fix[1:],
        )


def estimate_training(
    checkpoint: Checkpoint,
    recipe: TrainRecipe,
    dtype: str,
    shape: Mapping[str, int],
    total_steps: int,
    longest_tokens: int,
    device: str,
    calibration: Sequence[BatchSize] = (),
) -> Preflight:
    """Count parameters and bytes.

    Args:
        checkpoint: the base; its headers alone are read.
        recipe: the run's settings.
        dtype: of the frozen base.
        shape: counts to end with, by axis.
        total_steps: of the run.
        longest_tokens: of a row of the data.
        device: "cpu" or "cuda", whose dropout keep different things.
        calibration: each padded batch that the base is measured on, if it is.
    """
    target = checkpoint.sizes.with_counts(shape)
    wide = method_of(recipe).stays_wide(recipe) is not None
    # These are the sizes in memory while the model is trained.
    trained_sizes = replace(target, hidden=checkpoint.hidden_size) if wide else target
    if method_of(recipe).cuts_at_the_end:
        trained_sizes = replace(checkpoint.sizes, hidden=trained_sizes.hidden)
    hidden = trained_sizes.hidden
    counts = trained_parameters(checkpoint, recipe, shape, total_steps)
    base = parameters_at(checkpoint, trained_sizes, own_head=unties(checkpoint, recipe))
    width = DTYPE_BYTES[dtype]
    weights = weights_bytes(checkpoint, recipe, width, trained_sizes)
    tokens = recipe.batch_size * longest_tokens
    plain = dense_bytes_per_token(trained_sizes, width) * tokens
    tuning = tuning_bytes_per_token(checkpoint, recipe, width, device, trained_sizes) * tokens
    if recipe.gradient_checkpointing:
        activations = target.layers * hidden * width * tokens + plain + tuning
    else:
        tuned = min(LAST_LAYERS, target.layers) if recipe.train == HEAD_AND_LAST else target.layers
        activations = target.layers * plain + tuned * tuning
    # The embedding's HSM and the final norm.
    activations += tokens * hidden * (4 + (2 * width if method_of(recipe).follows_writers else 0))
    on_heap = device == "cpu" and tokens * hidden * width < HEAP_BLOCK_BYTES
    # The log-probabilities and two gradients in float32; of a 16-bit head its own gradient as well.
    # To distil: logits and their gradient in float32, of a 16-bit head in its own dtype too, and the teacher's logits.
    narrow = width if width < 4 else 0
    bytes_each = 8 + 2 * narrow + width if recipe.distillation_weight else 12 + narrow
    logits = tokens * target.vocab * bytes_each
    preparing = 0
    if calibration and not (sharded_by_fsdp() and device == "cuda"):
        preparing = preparing_bytes(checkpoint, recipe, width, target, calibration, counts.wide)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # Weights that are trained are float32; in the dtype of the frozen ones, autocast holds a copy of each.
    trained = (counts.lora + counts.tuned + counts.method) * TRAINED_BYTES
    if sharded_by_fsdp() and processes > 1:
        # A process holds its share of everything, and the layer at work in full.
        weights = weights // processes + weights // target.layers
        trained //= processes
    return Preflight(
        base_parameters=base,
        lora_parameters=counts.lora,
        tuned_parameters=counts.tuned,
        method_parameters=counts.method,
        wide_parameters=counts.wide if recipe.train == LORA else 0,
        weights_bytes=weights,
        trained_bytes=trained,
        activations_bytes=activations,
        logits_bytes=logits,
        allocator_bytes=round(HEAP_LOSS * (activations + logits)) if on_heap else 0,
        teacher_bytes=weights_bytes(checkpoint, recipe, width, checkpoint.sizes) if holds_teacher(recipe) else 0,
        teacher_share=teacher_share(checkpoint, recipe, base),
        tokens_per_step=tokens * (recipe.gradient_accumulation_steps or 1) * processes,
        preparing_bytes=preparing,
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"

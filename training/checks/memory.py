"""Memory of a training, counted from a checkpoint's headers: parameters, activations, and what comes before training.

The activations are what autograd keeps of LlamaDecoderLayer, peft's LoRA and the HSMs, for each token;
tests/test_preflight.py compares the counts with what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.cut.axes import AXES
from pat_serve.cut.rotation import ROWS_AT_ONCE
from pat_serve.perplexity import IGNORED_LABEL
from pat_serve.shapes.parameters import parameters_at
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.training.checks.choosing import choosing_bytes
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import method_of
from pat_serve.training.model.weights import LORA

# A weight in NF4, with its share of the scales, which are quantized too: 4.127 bits (arXiv 2305.14314).
NF4_BYTES = 4.127 / 8


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """One padded batch: its rows, the positions of each, and how many positions of all rows are in the loss."""

    rows: int
    length_tokens: int
    labelled_tokens: int

    @staticmethod
    def of(batch: dict[str, Tensor]) -> BatchSize:
        """Count a batch's input_ids and labels."""
        rows, length = batch["input_ids"].shape
        return BatchSize(
            rows=rows, length_tokens=length, labelled_tokens=int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
        )

    @property
    def tokens(self) -> int:
        """How many positions all rows have, padding included."""
        return self.rows * self.length_tokens


def weights_bytes(checkpoint: Checkpoint, recipe: TrainRecipe, width: int, sizes: ModelSizes) -> int:
    """The base's own, cut to these sizes, `width` bytes a number in its dtype, or quantized."""
    weights = parameters_at(checkpoint, sizes, own_head=unties(checkpoint, recipe)) * width
    if recipe.quantize_base:
        weights -= round(_quantized_parameters(checkpoint) * (width - NF4_BYTES))
    return weights


def unties(checkpoint: Checkpoint, recipe: TrainRecipe) -> bool:
    """The run gives a tied base a head of its own."""
    return checkpoint.tied and method_of(recipe).prunes and recipe.rotate != "none" and not recipe.keeps_tie


def _quantized_parameters(checkpoint: Checkpoint) -> int:
    """Parameters of the linears in the layers; bitsandbytes leaves embedding, norms and head as they are."""
    shapes = [entry.shape for name, entry in checkpoint.tensors.items() if ".layers." in name]
    return sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def dense_bytes_per_token(sizes: ModelSizes, width: int) -> int:
    """Bytes that autograd keeps of one frozen decoder layer for each token; a number in its dtype has `width` bytes.

    Frozen linears keep nothing of a token. Attention keeps no scores: sdpa's kernels recompute them.
    """
    norms = 2 * 4 * sizes.hidden  # their inputs, in float32
    return norms + sum(_branches_bytes_per_token(sizes, width))


def _branches_bytes_per_token(sizes: ModelSizes, width: int) -> tuple[int, int]:
    """Bytes a token that an attention and an MLP keep, without their norms."""
    attention = 4 * sizes.heads * sizes.head_dim * width  # q, k, v (repeated), the output
    mlp = 3 * sizes.ffn * width  # gate before and after the activation, up
    return attention, mlp


def tuning_bytes_per_token(
    checkpoint: Checkpoint, recipe: TrainRecipe, width: int, device: str, sizes: ModelSizes
) -> int:
    """Bytes a token that LoRA and the method add to a layer's own."""
    hidden, heads = sizes.hidden, sizes.heads * sizes.head_dim
    inputs = 5 * hidden + heads + sizes.ffn  # of the seven linears that LoRA adapts
    # LoRA's A gets inputs, and dropout remembers its choice: a byte each on a GPU, a float32 factor on a CPU.
    dropout = (1 if device == "cuda" else 4) if recipe.lora_dropout else 0
    if not method_of(recipe).adapts:
        # The inputs of the updates, which are made anew for the backward pass.
        return inputs * (width + dropout)
    lora = inputs * (width + dropout) + 7 * recipe.lora_rank * width
    if recipe.train != LORA:
        # A weight's gradient is made of its inputs; q, k and v share theirs, as gate and up do.
        lora = (2 * hidden + heads + sizes.ffn) * width
    hybrid = 0
    if method_of(recipe).follows_writers:
        # The operator's input, and L0's output.
        hybrid = 2 * width * (hidden + recipe.resolved_hio_rank(checkpoint.hidden_size))
    # The masks whose values are learnt multiply these.
    hybrid += width * (heads + sizes.ffn) if method_of(recipe).cuts_at_the_end else 0
    # The normalized stream, which the gains' gradients are made of.
    norms = 2 * hidden * width if recipe.train_norms else 0
    return lora + hybrid + norms


def preparing_bytes(
    checkpoint: Checkpoint,
    recipe: TrainRecipe,
    width: int,
    target: ModelSizes,
    calibration: Sequence[BatchSize],
    adapter_parameters: int,
) -> int:
    """The wide base and the most of what is done with it before an optimizer is there, one after the other.

    Args:
        checkpoint: the base.
        recipe: the run's settings.
        width: bytes of a number in the base's dtype.
        target: sizes to end with.
        calibration: each padded batch of the calibration's samples.
        adapter_parameters: trained ones at the base's width.
    """
    hidden = checkpoint.hidden_size
    held = [max(_measuring_bytes(checkpoint, recipe, width, size) for size in calibration)]
    if recipe.rotate != "none":
        # Q, and in float32 a piece of the largest weight with the gain in it and its product; a 16-bit one's copy too.
        copies = 2 if width == 4 else 3
        held.append(4 * hidden * (hidden + copies * min(ROWS_AT_ONCE, _most_outputs(checkpoint))))
    axes = [axis for axis in AXES if AXES[axis].length(target) < AXES[axis].length(checkpoint.sizes)]
    layer = dense_bytes_per_token(checkpoint.sizes, width)
    held.append(choosing_bytes(checkpoint, recipe, width, axes, calibration, layer))
    if recipe.compensate:
        held.append(4 * adapter_parameters + _compensating_bytes(checkpoint, recipe, width, target, calibration))
    return weights_bytes(checkpoint, recipe, width, checkpoint.sizes) + max(held)


def _measuring_bytes(checkpoint: Checkpoint, recipe: TrainRecipe, width: int, size: BatchSize) -> int:
    """Bytes that calibration takes on one batch."""
    tokens, hidden, layers = size.tokens, checkpoint.hidden_size, checkpoint.num_layers
    layer = dense_bytes_per_token(checkpoint.sizes, width)
    # A second moment in float32 and float64, and its sum before and after; of the gradient, the energy's sum too.
    moments = (36 if recipe.rotate == "loss" else 28) * hidden * hidden
    # The log-probabilities and two gradients in float32.
    logits = 12 * checkpoint.sizes.vocab * size.labelled_tokens
    if recipe.rotate == "loss":
        return tokens * layers * layer + logits + moments
    if recipe.mask_start == "gradient":
        # Weights that get one keep their inputs, and norms' the normalized stream.
        layer += width * (4 * hidden + checkpoint.sizes.ffn)
        # The largest one's gradient, its product with the weight, and that one's size.
        largest = 12 * hidden * _most_outputs(checkpoint)
        return tokens * (layers * layer + 2 * width * hidden) + max(logits, largest)
    return tokens * layer + moments


def _compensating_bytes(
    checkpoint: Checkpoint, recipe: TrainRecipe, width: int, target: ModelSizes, calibration: Sequence[BatchSize]
) -> int:
    sizes, config = checkpoint.sizes, checkpoint.config
    hidden, kept = sizes.hidden, target.hidden
    # Some families have a window and may leave it unused.
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    # Dense and cut states of all rows, from layer to layer, and the masks of what is padded or out of a window.
    states = sum(
        size.tokens * (2 * hidden * width + (size.length_tokens if _masked(size, window) else 0))
        for size in calibration
    )
    full = recipe.refit == "full"
    head = (unties(checkpoint, recipe) or not sizes.tied) if full else recipe.lora_head
    outputs = sizes.vocab if head else sizes.ffn
    # The largest reader's shortfall, in float32; a piece of its 16-bit rows in float32, or its random projection.
    piece = 4 * min(ROWS_AT_ONCE, outputs) * hidden if width < 4 else 0
    # A refit holds the kept columns before, and then after, in the weight's dtype.
    change = 4 * outputs * kept + max(piece, width * outputs * kept if full else 8 * outputs * recipe.lora_rank)
    if kept == hidden:
        change = 0  # the readers of a whole stream stay as they are
    # In float64: the moments and their factor, and the change with what it is made of.
    moments = 8 * kept * (3 * kept + 4 * hidden) if kept < hidden else 0
    if recipe.keeps_tie:
        # The last gain's fit: the head's second moment, what the dense head is of it, and their products.
        moments = max(moments, 8 * (4 * hidden * hidden + 4 * kept * kept) - change)
    # A branch at work, and its norm in float32, twice.
    branch = (8 * hidden + max(_branches_bytes_per_token(sizes, width))) * max(size.tokens for size in calibration)
    # A writer that is set: its outputs as they should be for every row, its moments, their factor, a kept part.
    inner = [
        length
        for length, left in ((sizes.ffn, target.ffn), (sizes.heads * sizes.head_dim, target.heads * sizes.head_dim))
        if full or left < length or target.layers < sizes.layers
    ]
    if inner:
        states += width * hidden * sum(size.tokens for size in calibration)
        moments = max(moments, 8 * max(inner) * (4 * max(inner) + 4 * hidden))
    # The axes that the base was turned to, which the run keeps, and the moments of the batches before.
    kept_on = (4 * hidden * hidden if recipe.rotate != "none" else 0) + 8 * kept * (kept + hidden)
    return states + kept_on + max(branch, change + moments)


def _masked(size: BatchSize, window: int | None) -> bool:
    """Attention gets a mask of the batch: one that may hold padding, or is longer than the window."""
    return size.rows > 1 or size.length_tokens >= (window or math.inf)


def _most_outputs(checkpoint: Checkpoint) -> int:
    """The largest number of outputs among the weights that read or write the residual stream."""
    return max(checkpoint.sizes.vocab, checkpoint.sizes.ffn)

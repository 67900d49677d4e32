"""What a training holds, counted from a checkpoint's headers: parameters, activations, and what comes before training.

The activations are what autograd keeps of LlamaDecoderLayer, peft's LoRA and the HSMs, for each token;
tests/test_preflight.py compares the counts with what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pat_serve.architectures import EMBEDDING, HEAD, HIDDEN
from pat_serve.checkpoint import Checkpoint
from pat_serve.training.config import TrainRecipe

# A weight in NF4, with its share of the scales, which are quantized too: 4.127 bits (arXiv 2305.14314).
NF4_BYTES = 4.127 / 8


def base_parameters(checkpoint: Checkpoint, recipe: TrainRecipe, hidden: int) -> int:
    """The base's own, at a width."""
    shapes = {name: list(entry.shape) for name, entry in checkpoint.tensors.items()}
    if checkpoint.tied:
        shapes.pop(f"{HEAD}.weight", None)
    if unties(checkpoint, recipe):
        shapes[f"{HEAD}.weight"] = shapes[f"{EMBEDDING}.weight"]
    count = 0
    for name, shape in shapes.items():
        axes = checkpoint.family.match(name)[0].axes
        count += math.prod(hidden if axis == HIDDEN else size for axis, size in zip(axes, shape, strict=False))
    return count


def weights_bytes(checkpoint: Checkpoint, recipe: TrainRecipe, width: int, hidden: int) -> int:
    """The base's own, at a width, `width` bytes a number in its dtype, or quantized."""
    weights = base_parameters(checkpoint, recipe, hidden) * width
    if recipe.quantize_base:
        weights -= round(_quantized_parameters(checkpoint) * (width - NF4_BYTES))
    return weights


def unties(checkpoint: Checkpoint, recipe: TrainRecipe) -> bool:
    """The run gives a tied base a head of its own."""
    return checkpoint.tied and recipe.method != "lora" and recipe.rotate != "none"


def _quantized_parameters(checkpoint: Checkpoint) -> int:
    """Of the linears inside the layers; bitsandbytes leaves embedding, norms and head as they are."""
    shapes = [entry.shape for name, entry in checkpoint.tensors.items() if ".layers." in name]
    return sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def dense_bytes_per_token(checkpoint: Checkpoint, width: int, hidden: int) -> int:
    """What autograd keeps of one frozen decoder layer for each token, in bytes; `width` bytes a number in its dtype.

    Frozen linears keep nothing of a token. Attention keeps no scores: sdpa's kernels recompute them.
    """
    norms = 2 * 4 * hidden  # their inputs, in float32
    attention = 4 * checkpoint.num_attention_heads * checkpoint.head_dim * width  # q, k, v (repeated), the output
    mlp = 3 * int(checkpoint.config["intermediate_size"]) * width  # gate before and after the activation, up
    return norms + attention + mlp


def tuning_bytes_per_token(checkpoint: Checkpoint, recipe: TrainRecipe, width: int, device: str, hidden: int) -> int:
    """What LoRA and the method add to that."""
    ffn, heads = int(checkpoint.config["intermediate_size"]), checkpoint.num_attention_heads * checkpoint.head_dim
    inputs = 5 * hidden + heads + ffn  # of the seven linears that LoRA adapts
    # What LoRA's A gets, and what dropout remembers: bits as bytes on a GPU, float32 factors on a CPU.
    dropout = (1 if device == "cuda" else 4) if recipe.lora_dropout else 0
    lora = inputs * (width + dropout) + 7 * recipe.lora_rank * width
    hybrid = 0
    if recipe.method != "lora":
        # The operator's input, and L0's output.
        hybrid = 2 * width * (hidden + recipe.resolved_hio_rank(checkpoint.hidden_size))
    # The normalized stream, which the gains' gradients are made of.
    norms = 2 * hidden * width if recipe.train_norms else 0
    return lora + hybrid + norms


def preparing_bytes(
    checkpoint: Checkpoint,
    recipe: TrainRecipe,
    width: int,
    kept: int,
    calibration: Sequence[tuple[int, ...]],
    logits_bytes_per_token: int,
) -> int:
    """Of the wide base, before an optimizer is there."""
    hidden, vocabulary = checkpoint.hidden_size, int(checkpoint.config["vocab_size"])
    weights = weights_bytes(checkpoint, recipe, width, hidden)
    dense = checkpoint.num_layers * dense_bytes_per_token(checkpoint, width, hidden)
    # The loss's gradient is taken batch by batch.
    gradient = max(map(math.prod, calibration)) * (dense + logits_bytes_per_token)
    if not recipe.compensate:
        return weights + gradient
    # Dense and cut states of all rows, from layer to layer, and the masks of what is padded.
    states = sum(rows * tokens * (2 * hidden * width + (tokens if rows > 1 else 0)) for rows, tokens in calibration)
    # What the largest reader lacks, in float32, its random projection, and in float64 moments, factor and guess.
    outputs = vocabulary if recipe.lora_head else int(checkpoint.config["intermediate_size"])
    change = 4 * outputs * (kept + 2 * recipe.lora_rank) + 8 * kept * (2 * kept + 3 * hidden)
    return weights + max(gradient, states + change)

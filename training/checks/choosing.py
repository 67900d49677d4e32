"""Memory of choices that look at a whole model before anything of it is cut, counted from a checkpoint's headers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.cut.axes import AXES, FFN, KV_GROUPS
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.training.choices import choice_of
from pat_serve.training.choices.taylor import HELD_BYTES, Taylor
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import method_of
from pat_serve.training.methods.search.genome import MOST_CHANGES
from pat_serve.training.methods.search.method import ROUNDS, SearchSettings
from pat_serve.training.methods.search.refits import CACHED_BYTES
from pat_serve.training.model.group_scores import members

if TYPE_CHECKING:
    from pat_serve.training.checks.memory import BatchSize


def choosing_bytes(
    checkpoint: Checkpoint,
    recipe: TrainRecipe,
    width: int,
    axes: Iterable[str],
    calibration: Sequence[BatchSize],
    layer_bytes: int,
) -> int:
    """Bytes beside the base while it is chosen what stays; 0 where a choice looks at one linear alone.

    Args:
        checkpoint: the base.
        recipe: the run's settings.
        width: bytes of a number in the base's dtype.
        axes: that are cut.
        calibration: each padded batch of the calibration's samples.
        layer_bytes: that autograd keeps of one layer for each token.
    """
    sizes, method = checkpoint.sizes, method_of(recipe)
    inner = [axis for axis in axes if axis in (FFN, KV_GROUPS)]
    if method.searches:
        settings = SearchSettings.of(recipe)
        # The first candidate's refits, and what each child changes.
        made = sizes.layers * len(inner) + MOST_CHANGES * settings.generations * settings.offspring
        return _searching_bytes(sizes, width, inner, made, calibration)
    chosen = {axis: choice_of(axis, {**method.choices, **recipe.choose}) for axis in inner}
    scored = {axis: choice for axis, choice in chosen.items() if isinstance(choice, Taylor)}
    if not scored:
        return 0
    by_row = any(choice.by_row for choice in scored.values())
    weights = sum(math.prod(spec.shape("weight", sizes)) for _, spec, _ in members(checkpoint.family, sizes, scored))
    largest = max(sizes.ffn, sizes.heads * sizes.head_dim) * sizes.hidden
    # A gradient, in the dtype of its weight and in float32, with its square.
    one = largest * (width + 8)
    activations = max(
        (size.tokens // (size.rows if by_row else 1)) * (sizes.layers * _scored_bytes(sizes, width, layer_bytes))
        + 12 * sizes.vocab * (size.length_tokens if by_row else size.labelled_tokens)
        for size in calibration
    )
    return min(max(HELD_BYTES, weights // sizes.layers * 8), weights * (8 if by_row else 4)) + one + activations


def _scored_bytes(sizes: ModelSizes, width: int, layer_bytes: int) -> int:
    """Bytes a token that a layer keeps whose weights get gradients: the inputs of all linears too."""
    return layer_bytes + width * (2 * sizes.hidden + sizes.heads * sizes.head_dim + sizes.ffn)


def _searching_bytes(
    sizes: ModelSizes, width: int, inner: Sequence[str], made: int, calibration: Sequence[BatchSize]
) -> int:
    """Moments and dense weights of all writers, the refits that are kept, one solve, and the dense model's answers."""
    inputs = [sizes.ffn if axis == FFN else AXES[KV_GROUPS].length(sizes) * _group(sizes) for axis in inner]
    moments = sizes.layers * sum(4 * length**2 + width * length * sizes.hidden for length in inputs)
    solve = 8 * max((4 * length**2 for length in inputs), default=0)
    refits = min(CACHED_BYTES, made * width * sizes.hidden * max(inputs, default=0))
    judged = [size.labelled_tokens for size in calibration[: ROUNDS[-1]]]
    answers = 2 * sizes.vocab * sum(judged)
    # One batch has a candidate's logits, as they come and in float32, and both models' log-probabilities.
    logits = (width + 12) * sizes.vocab * max(judged)
    return moments + solve + refits + answers + logits


def _group(sizes: ModelSizes) -> int:
    """Inputs of the output projection that a key-value group has."""
    return sizes.heads_per_group * sizes.head_dim

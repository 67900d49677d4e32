"""The savings of a cut, told before a weight is read: parameters, a decode step's bytes, the KV cache.

A share of the parameters is not that share of what a step reads: a head that gets a matrix of its own adds parameters,
of which a step reads no more than before, and no width changes the KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.shapes.geometry import count_parameters
from pat_serve.shapes.parameters import parameters_at
from pat_serve.shapes.sizes import ModelSizes, decode_bytes
from pat_serve.terminal.progress import say
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import method_of

# Batch and context: one answer alone, and a server at work.
LOADS = ((1, 128), (8, 1024))


def report_cut(recipe: TrainRecipe, checkpoint: Checkpoint, shape: Mapping[str, int]) -> None:
    """Tell the user what goes.

    Args:
        recipe: resolved.
        checkpoint: the base; its headers alone are read.
        shape: counts to end with, by axis.
    """
    if method_of(recipe).prunes:
        for line in cut_lines(recipe, checkpoint, shape):
            say(line)


def cut_lines(recipe: TrainRecipe, checkpoint: Checkpoint, shape: Mapping[str, int]) -> list[str]:
    """The report's lines, for a method that prunes. The arguments are those of `report_cut`."""
    unties = gets_own_head(recipe, checkpoint)
    dense = checkpoint.sizes
    cut = replace(dense.with_counts(shape), tied=dense.tied and not unties)
    base, kept = parameters_at(checkpoint, dense), parameters_at(checkpoint, cut, own_head=unties)
    item_bytes = checkpoint.dtype.itemsize
    read = ", ".join(
        f"{_less(_step_bytes(dense, load, item_bytes), _step_bytes(cut, load, item_bytes))} at {load[0]}x{load[1]}"
        for load in LOADS
    )
    lines = [
        f"cut: {_changes(dense, cut)}; parameters {count_parameters(base)} to "
        f"{count_parameters(kept)}, {_less(base, kept)}; bytes read for a decoded token {read} (batch x context); "
        f"KV cache {_less(dense.kv_values_per_token, cut.kv_values_per_token)}"
    ]
    if unties:
        head = count_parameters(cut.vocab * cut.hidden)
        lines.append(f"cut: the head, tied to the embedding in the base, gets a matrix of its own: {head} of these")
    return lines


def _changes(base: ModelSizes, target: ModelSizes) -> str:
    """ "hidden_size 576 to 432, layers 30 to 27" """
    names = {"hidden": "hidden_size", "layers": "layers", "ffn": "FFN", "kv_heads": "key-value heads"}
    pairs = [(told, getattr(base, name), getattr(target, name)) for name, told in names.items()]
    return ", ".join(f"{told} {before} to {after}" for told, before, after in pairs if before != after)


def gets_own_head(recipe: TrainRecipe, checkpoint: Checkpoint) -> bool:
    """A tied base is exported with a head of its own: a rotation unties it, or a full operator on the embedding."""
    operator = recipe.tied_embeddings == "untie" and recipe.resolved_hio_rank(checkpoint.hidden_size) > 0
    return checkpoint.tied and ((recipe.rotate != "none" and not recipe.keeps_tie) or operator)


def _step_bytes(sizes: ModelSizes, load: tuple[int, int], item_bytes: int) -> float:
    batch_size, context_tokens = load
    return decode_bytes(sizes, batch_size=batch_size, context_tokens=context_tokens, dtype_bytes=item_bytes)


def _less(before: float, after: float) -> str:
    share = 1 - after / before
    if abs(share) < 5e-4:
        return "unchanged"
    return f"{abs(share):.1%} {'less' if share > 0 else 'more'}"

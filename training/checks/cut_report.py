"""The savings of a cut, told before a weight is read: parameters, a decode step's bytes, the KV cache.

A share of the channels is not that share of the model: a tied base whose head gets a matrix of its own keeps most of
its parameters, and no width changes the KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.cut.axes import HIDDEN
from pat_serve.shapes.geometry import count_parameters, legal_step, legal_widths
from pat_serve.shapes.parameters import parameters_at
from pat_serve.shapes.sizes import ModelSizes, decode_bytes
from pat_serve.terminal.progress import say
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import method_of

# Batch and context: one answer alone, and a server at work.
LOADS = ((1, 128), (8, 1024))
# A cut may miss the asked share by so much of all parameters before it is worth a word.
TOLERANCE = 0.02


def report_cut(recipe: TrainRecipe, checkpoint: Checkpoint, shape: Mapping[str, int]) -> None:
    """Tell the user what goes, and what would reach the share that was asked for.

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
    asked = 0.25 if recipe.ratio is None else recipe.ratio
    if unties and recipe.hidden_size is None and not recipe.shape and 1 - kept / base < asked - TOLERANCE:
        lines.append(_way_out(checkpoint, base, asked, shape[HIDDEN]))
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


def _way_out(checkpoint: Checkpoint, base: int, asked: float, width: int) -> str:
    """Name the width that cuts as large a share of all parameters as was asked of the channels."""
    rule = checkpoint.family.hidden_multiple_of_heads
    step = legal_step(checkpoint.num_attention_heads, hidden_multiple_of_heads=rule)

    def parameters(k: int, *, own_head: bool) -> int:
        return parameters_at(checkpoint, replace(checkpoint.sizes, hidden=k), own_head=own_head)

    def leaves(k: int, *, own_head: bool) -> str:
        left = parameters(k, own_head=own_head)
        return f"{count_parameters(left)}, {_less(base, left)}"

    # Parameters grow with the width by the same number for each channel.
    widest = parameters(checkpoint.hidden_size, own_head=True)
    per_channel = widest - parameters(checkpoint.hidden_size - 1, own_head=True)
    wanted = checkpoint.hidden_size - (widest - (1 - asked) * base) / per_channel
    nearest = min(legal_widths(step, checkpoint.hidden_size), key=lambda k: abs(k - wanted))
    narrower = f"--hidden-size {nearest} ({leaves(nearest, own_head=True)}), or " if nearest < width else ""
    return (
        f"cut: {asked:g} is a share of the channels; the head, tied to the embedding in the base, gets a matrix of its "
        f"own. Nearer to that share of the parameters: {narrower}--tied-embeddings keep, at "
        f"hidden_size {width} ({leaves(width, own_head=False)})"
    )


def _step_bytes(sizes: ModelSizes, load: tuple[int, int], item_bytes: int) -> float:
    batch_size, context_tokens = load
    return decode_bytes(sizes, batch_size=batch_size, context_tokens=context_tokens, dtype_bytes=item_bytes)


def _less(before: float, after: float) -> str:
    share = 1 - after / before
    if abs(share) < 5e-4:
        return "unchanged"
    return f"{abs(share):.1%} {'less' if share > 0 else 'more'}"

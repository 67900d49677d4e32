"""The shape that a run ends with."""

from __future__ import annotations

from dataclasses import replace

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.cut.axes import HIDDEN
from pat_serve.errors import UsageError
from pat_serve.shapes.fitness import slow_width
from pat_serve.shapes.geometry import check_width, fast_tile, snap_ratio
from pat_serve.shapes.parameters import parameters_at
from pat_serve.shapes.shape import check_shape
from pat_serve.terminal.progress import say
from pat_serve.training.checks.cut_report import gets_own_head
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import method_of
from pat_serve.training.methods.pat.method import Pat


def target_shape(recipe: TrainRecipe, checkpoint: Checkpoint) -> dict[str, int]:
    """Counts to end with by axis, the stream's always among them; the base's own for a method that does not prune.

    Raises:
        UsageError: a count of an axis that the method does not cut, or none of one that it wants.
        IllegalShape: no stock class has these sizes, or nothing is cut.
        IllegalWidth: no stock class has this width.
    """
    method = method_of(recipe)
    given = {"--ratio": recipe.ratio, "--hidden-size": recipe.hidden_size, "--shape": recipe.shape or None}
    [(flag, value)] = [item for item in given.items() if item[1] is not None] or [("--shape", None)]
    named = set(recipe.shape) if recipe.shape else {HIDDEN} if value is not None else set()
    if stray := sorted(named - method.axes):
        raise UsageError(
            flag,
            expected=f"none, since --method {recipe.method} cuts nothing"
            if not method.prunes
            else f"axes of --method {recipe.method}: {', '.join(sorted(method.axes))}",
            found=f"{stray[0]}={recipe.shape[stray[0]]}" if recipe.shape else str(value),
            fix="Leave it out, or choose another method.",
        )
    if recipe.shape:
        if recipe.method == Pat.name and HIDDEN not in recipe.shape:
            raise UsageError(
                "--method pat",
                expected="hidden in --shape, which is what it is for",
                found=", ".join(sorted(recipe.shape)),
                fix="Leave --method out: the other axes need no method of their own.",
            )
        check_shape(recipe.shape, checkpoint.sizes, checkpoint.family, checkpoint.config)
        return {HIDDEN: checkpoint.hidden_size} | recipe.shape
    if method.prunes and HIDDEN not in method.axes:
        raise UsageError(
            f"--method {recipe.method}",
            expected="--shape, with counts of " + ", ".join(sorted(method.axes)),
            found="none",
            fix="Give one, as --shape layers=24,ffn=1280.",
        )
    return {HIDDEN: _target_width(recipe, checkpoint) if method.prunes else checkpoint.hidden_size}


def _target_width(recipe: TrainRecipe, checkpoint: Checkpoint) -> int:
    """K, from the recipe's hidden_size or ratio."""
    shape = (checkpoint.hidden_size, checkpoint.num_attention_heads)
    rule = checkpoint.family.hidden_multiple_of_heads
    if recipe.hidden_size is not None:
        base, own_head = checkpoint.sizes, gets_own_head(recipe, checkpoint)

        def parameters(width: int) -> int:
            return parameters_at(checkpoint, replace(base, hidden=width), own_head=own_head)

        width = check_width(recipe.hidden_size, *shape, hidden_multiple_of_heads=rule, parameters=parameters)
        narrow = replace(base, hidden=width)
        if slow := slow_width(base.hidden, narrow, hidden_multiple_of_heads=rule, parameters=parameters):
            say(slow)
        return width
    ratio = 0.25 if recipe.ratio is None else recipe.ratio
    width, snapped = snap_ratio(ratio, *shape, hidden_multiple_of_heads=rule)
    if snapped:
        exact = (1 - ratio) * checkpoint.hidden_size
        cut = 1 - width / checkpoint.hidden_size
        say(
            f"--ratio {ratio} asks for a hidden_size of {exact:g}; {width} is the nearest "
            f"{'legal and fast' if fast_tile(*shape, hidden_multiple_of_heads=rule) else 'legal'} one, "
            f"a cut of {cut:.1%} (--hidden-size takes any legal one)"
        )
    return width


def check_ties(recipe: TrainRecipe, checkpoint: Checkpoint) -> None:
    """Check what the recipe says of a tied base's embedding and head.

    Raises:
        UsageError: it says something that the base or another setting does not allow.
    """
    prunes = method_of(recipe).prunes
    rotates = prunes and recipe.rotate != "none"
    parts = prunes and gets_own_head(recipe, checkpoint)
    if recipe.lora_head and checkpoint.tied and not parts:
        raise UsageError(
            "--lora-head",
            expected="a head of its own",
            found="one that stays tied to the embedding",
            fix=_way_to_a_head(prunes=prunes, rotates=rotates),
        )
    if not checkpoint.tied:
        why = "the base's head is its own tensor"
    elif not prunes:
        why = f"--method {recipe.method} puts no operator there"
    elif rotates and recipe.tied_embeddings == "keep":
        if recipe.keeps_tie:
            return
        why = "--rotate unties the head, unless --gate cut is compensated for and nothing distilled"
    elif recipe.tied_embeddings == "untie" and not parts:
        raise UsageError(
            "--tied-embeddings",
            expected="an operator on the embedding, or a rotation, that unties it",
            found="untie, with --hio-rank 0 and --rotate none",
            fix="Add --hio-rank 8, or leave it out.",
        )
    else:
        return
    if recipe.tied_embeddings == "auto":
        return
    raise UsageError(
        "--tied-embeddings", expected=f"auto, since {why}", found=recipe.tied_embeddings, fix="Leave it out."
    )


def _way_to_a_head(*, prunes: bool, rotates: bool) -> str:
    if not prunes:
        return "Leave it out, or choose --rotate loss and a method that prunes."
    if rotates:
        return "Leave it out, or choose --tied-embeddings untie."
    return "Leave it out, or choose --rotate loss, or --tied-embeddings untie with --hio-rank 8."

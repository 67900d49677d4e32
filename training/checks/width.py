"""The shape that a run ends with."""

from __future__ import annotations

from dataclasses import replace

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.cut.axes import AXES, HIDDEN
from pat_serve.errors import IllegalRatio, UsageError
from pat_serve.shapes.candidates import TOLERANCE, counts_for_ratio, exported_sizes, share_cut
from pat_serve.shapes.fitness import slow_width
from pat_serve.shapes.geometry import MAX_RATIO, check_width
from pat_serve.shapes.parameters import parameters_at
from pat_serve.shapes.shape import check_shape, shape_text
from pat_serve.terminal.progress import say
from pat_serve.training.checks.cut_report import gets_own_head
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import Method, method_of
from pat_serve.training.methods.pat.method import Pat


def target_shape(recipe: TrainRecipe, checkpoint: Checkpoint) -> dict[str, int]:
    """Counts to end with by axis, the stream's always among them; the base's own for a method that does not prune.

    Raises:
        UsageError: a count of an axis that the method does not cut, or none of one that it wants.
        IllegalShape: no stock class has these sizes, or nothing is cut.
        IllegalWidth: no stock class has this width.
        IllegalRatio: the share is outside (0, 0.6], or the base has no counts to cut to.
    """
    method = method_of(recipe)
    given: dict[str, object] = {
        "--hidden-size": recipe.hidden_size,
        "--shape": recipe.shape or None,
        "--axes": recipe.axes or None,
        "--ratio": None if recipe.axes else recipe.ratio,
    }
    [(flag, value)] = [item for item in given.items() if item[1] is not None] or [("--shape", None)]
    named = set(recipe.shape or recipe.axes) or ({HIDDEN} if value is not None else set())
    if stray := sorted(named - method.axes):
        raise UsageError(
            flag,
            expected=f"none, since --method {recipe.method} cuts nothing"
            if not method.prunes
            else f"axes of --method {recipe.method}: {', '.join(sorted(method.axes))}",
            found=f"{stray[0]}={recipe.shape[stray[0]]}" if recipe.shape else stray[0] if recipe.axes else str(value),
            fix=f"Add --axes {_axes_of(method)} to say what the ratio cuts."
            if flag == "--ratio" and method.prunes
            else "Leave it out, or choose another method.",
        )
    if not method.prunes:
        return {HIDDEN: checkpoint.hidden_size}
    if named and recipe.method == Pat.name and HIDDEN not in named:
        raise UsageError(
            "--method pat",
            expected=f"hidden in {flag}, which is what it is for",
            found=", ".join(sorted(named)),
            fix="Leave --method out: the other axes need no method of their own.",
        )
    if recipe.shape:
        check_shape(recipe.shape, checkpoint.sizes, checkpoint.family, checkpoint.config)
        return {HIDDEN: checkpoint.hidden_size} | recipe.shape
    if not named and HIDDEN not in method.axes:
        raise UsageError(
            f"--method {recipe.method}",
            expected="--shape with counts, or --axes, of " + ", ".join(sorted(method.axes)),
            found="none",
            fix=f"Give one, as --ratio 0.25 --axes {_axes_of(method)}.",
        )
    if recipe.hidden_size is not None:
        return {HIDDEN: _checked_width(recipe.hidden_size, recipe, checkpoint)}
    return {HIDDEN: checkpoint.hidden_size} | _counts_of_ratio(recipe, checkpoint)


def _axes_of(method: type[Method]) -> str:
    """The axes of a method, as --axes takes them."""
    return ",".join(axis for axis in AXES if axis in method.axes - {HIDDEN})


def _checked_width(width: int, recipe: TrainRecipe, checkpoint: Checkpoint) -> int:
    base, own_head = checkpoint.sizes, gets_own_head(recipe, checkpoint)
    rule = checkpoint.family.hidden_multiple_of_heads

    def parameters(width: int) -> int:
        return parameters_at(checkpoint, replace(base, hidden=width), own_head=own_head)

    check_width(width, base.hidden, base.heads, hidden_multiple_of_heads=rule, parameters=parameters)
    narrow = replace(base, hidden=width)
    if slow := slow_width(base.hidden, narrow, hidden_multiple_of_heads=rule, parameters=parameters):
        say(slow)
    return width


def _counts_of_ratio(recipe: TrainRecipe, checkpoint: Checkpoint) -> dict[str, int]:
    """Counts along the recipe's axes that cut its share of all parameters, or that come nearest to it."""
    ratio = 0.25 if recipe.ratio is None else recipe.ratio
    axes, base = recipe.axes or (HIDDEN,), checkpoint.sizes
    unties = gets_own_head(recipe, checkpoint)
    counts = counts_for_ratio(base, checkpoint.family, ratio, axes, config=checkpoint.config, unties=unties)
    if counts is None:
        raise IllegalRatio(
            "--ratio",
            expected=f"a base of which a part of {', '.join(axes)} can be cut",
            found=f"no counts that a stock class takes below {', '.join(f'{a} {AXES[a].length(base)}' for a in axes)}",
            fix="Leave an axis out of --axes, or choose a larger base.",
        )
    share = share_cut(base, exported_sizes(base, counts, unties=unties))
    if abs(share - ratio) > TOLERANCE:
        say(
            f"--ratio {ratio}: {shape_text(counts)} cuts {share:.1%} of all parameters, the nearest that counts of "
            f"{', '.join(counts)} come with at most {MAX_RATIO:.0%} of each cut"
        )
    return counts


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
    elif HIDDEN not in method_of(recipe).axes:
        if recipe.tied_embeddings == "keep":
            return
        why = f"--method {recipe.method} leaves the stream and the head as they are"
    elif rotates and recipe.tied_embeddings == "keep":
        if recipe.keeps_tie:
            return
        why = "--rotate unties the head, unless --gate cut is compensated for"
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

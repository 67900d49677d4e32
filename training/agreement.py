"""Settings of a recipe that do not go together, or that its method has no use for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pat_serve.errors import UsageError
from pat_serve.training.model.least_squares import SHRINKAGE
from pat_serve.training.presets import FORMER_CALIBRATION_ROWS, PAPER, PAPER_RATES

if TYPE_CHECKING:
    from pat_serve.training.config import TrainRecipe


def disagreements(recipe: TrainRecipe) -> Iterator[str]:
    """Say of each pair of settings that exclude each other why they do, and what to give instead."""
    yield from _of_the_cut(recipe)
    if recipe.quantize_base:
        yield from _with_a_quantized_base(recipe)
    if recipe.train != "lora" and (recipe.refit == "lora" or recipe.lora_head):
        yield f"train {recipe.train} has no adapter: no refit lora, no lora_head"
    if recipe.refit != "auto" and recipe.compensate is False:
        yield "refit says how to compensate: no refit, or compensate"
    if recipe.refit_shrinkage != SHRINKAGE and recipe.compensate is False:
        yield "refit_shrinkage holds back what compensates: no refit_shrinkage, or compensate"
    if recipe.compensate and recipe.gate in ("anneal", "gradual"):
        yield "compensate makes up for a cut that is there from the start: gate cut"
    if recipe.eval_data is not None and recipe.eval_share is not None:
        yield "give eval_data or eval_share, not both"
    if recipe.streaming and recipe.max_steps is None:
        yield "max_steps beside streaming, since a stream has no epochs"
    if recipe.streaming and recipe.search_minutes:
        yield "search_minutes without streaming, since shapes are compared on rows that are kept"
    if recipe.streaming and recipe.eval_share is not None:
        yield "eval_data beside streaming, since a stream cannot be split"


def _of_the_cut(recipe: TrainRecipe) -> Iterator[str]:
    if recipe.ratio is not None and recipe.hidden_size is not None:
        yield "give ratio or hidden_size, not both"
    if recipe.shape and (recipe.ratio is not None or recipe.hidden_size is not None):
        yield "give ratio, hidden_size or shape, one of them"
    if recipe.axes and (recipe.shape or recipe.hidden_size is not None):
        yield "axes say where ratio cuts: give ratio beside them, and neither shape nor hidden_size"
    if recipe.speedup is not None and recipe.ratio is not None:
        yield "give ratio or speedup, not both"
    for name in ("search_minutes", "speedup"):
        if not getattr(recipe, name):
            continue
        if recipe.shape or recipe.hidden_size is not None:
            yield f"{name} looks for a shape: no shape and no hidden_size beside it"
        if "method" in recipe.model_fields_set:
            yield f"the shape that {name} finds decides the method: no method beside it"


def _with_a_quantized_base(recipe: TrainRecipe) -> Iterator[str]:
    if recipe.inner_axes:
        yield f"a quantized base cannot be cut down, as a cut of {recipe.inner_axes[0]} does"
    if recipe.rotate in ("energy", "loss"):
        yield "a quantized base cannot be rotated: rotate none"
    if recipe.mask_start == "gradient":
        yield "a quantized weight has no gradient: mask_start energy or zero"
    if recipe.compensate:
        yield "compensate reads weights, which a quantized base has packed: no compensate"
    if recipe.train != "lora":
        yield "a quantized weight cannot be trained: train lora"
    for name in ("search_minutes", "speedup"):
        if getattr(recipe, name):
            yield f"a quantized base cannot be cut along most axes: no {name} beside quantize_base"


def refuse_unused(recipe: TrainRecipe) -> None:
    """Refuse settings that the method has no use for; what it cuts is checked with the base.

    Raises:
        UsageError: such a setting has another value than its default and the presets' ones.
    """
    from pat_serve.training.methods import METHODS

    method, fields = METHODS[recipe.method], type(recipe).model_fields
    refused = dict.fromkeys(
        method.unused - {"tied_embeddings", "ratio", "hidden_size", "shape"},
        (f"--method {recipe.method} {method.why_unused}", "choose another method"),
    )
    if recipe.train != "lora":
        why = (f"--train {recipe.train} trains weights themselves", "give --train lora")
        refused |= dict.fromkeys(("lora_rank", "lora_alpha", *(["lora_dropout"] if recipe.lora_dropout else [])), why)
    for name in filter(refused.__contains__, fields):
        value, default = getattr(recipe, name), fields[name].get_default(call_default_factory=True)
        # A preset's value says nothing of what the user wants, nor does a former default; alpha follows the rank.
        former = FORMER_CALIBRATION_ROWS if name == "calibration_rows" else default
        if value not in (default, former, PAPER.get(name, default), PAPER_RATES.get(name, default)):
            raise UsageError(
                f"--{name.replace('_', '-')}",
                expected=f"none, since {refused[name][0]}",
                found=str(value),
                fix=f"Leave it out, or {refused[name][1]}.",
            )

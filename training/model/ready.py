"""From a loaded base to a model that is ready for its first step: the stages in the order that each needs.

`pat-train`, the notebook API and the pre-flight, which counts on a model without storage, all go this way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pat_serve.cut.axes import AXES, HIDDEN, LAYERS
from pat_serve.cut.cuts import AxisCut, Cuts, line_name
from pat_serve.families.family import Family
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.training.choices import Choice, InnerChoice, LayerChoice, ModelChoice, choice_of
from pat_serve.training.choices.base import largest
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import Method, method_of
from pat_serve.training.model.calibration import Calibration
from pat_serve.training.model.compensation import compensate
from pat_serve.training.model.insert import adapt
from pat_serve.training.model.norms import train_norms
from pat_serve.training.model.slicing import slice_model
from pat_serve.training.model.weights import LORA, train_weights
from pat_serve.training.ranks import same_on_all


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """Decisions of a run before its first step, for a run that is resumed.

    Attributes:
        kept: int64 indices that stay, by line of all axes but the stream's.
        weights: replaced weights of the (turned) base, by name; empty where the run replaced none.
        is_tuned: a checkpoint holds the adapter as it has become since.
    """

    kept: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    is_tuned: bool


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A model before its first step.

    Attributes:
        model: the PEFT model.
        method: attached to it.
        wide_parameters: trained ones before the model was cut down, whose shapes a run's adapter and plan have.
        replaced: names in the base of the linears whose weights were replaced.
        trained: names in the base of the modules whose weights are trained; none where LoRA is.
    """

    model: nn.Module
    method: Method
    wide_parameters: int
    replaced: Sequence[str] = ()
    trained: Sequence[str] = ()


def make_ready(
    base: Any,
    family: Family,
    recipe: TrainRecipe,
    shape: Mapping[str, int],
    total_steps: int,
    *,
    calibration: Calibration | None = None,
    batches: Sequence[dict[str, Tensor]] = (),
    earlier: Earlier | None = None,
    folder: Path | None = None,
) -> Ready:
    """Adapt a base, choose what stays of it, make up for the rest, cut it down, and let the norms be trained.

    Args:
        base: a causal language model of transformers; changed in place.
        family: its architecture.
        recipe: the run's settings, resolved.
        shape: counts to end with, by axis.
        total_steps: optimizer steps of the whole run.
        calibration: of the base, for a method that wants one.
        batches: rows of the training data, padded, that choices and compensation see.
        earlier: of a run that is resumed.
        folder: the run's, laid out, where a method that searches keeps its scores.
    """
    known = choose_on_the_model(base, family, recipe, shape, batches, earlier, folder)
    if method_of(recipe).searches:
        # The method decided over the counts too.
        shape = {HIDDEN: shape[HIDDEN], **{line.partition(".")[0]: len(kept) for line, kept in known.items()}}
    layers = _choose_layers(base, recipe, shape, batches, known)
    model, method = adapt(base, family, recipe, shape, total_steps, calibration)
    wide_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    method.on_step(0)
    replaced = _choose_and_compensate(model, method, recipe, shape, layers, known, batches, earlier)
    method.begin(batches)
    sliced = {} if method.cuts_at_the_end else dict(method.chosen)
    if method.stays_wide(recipe) is None:
        kept_K = method.kept_channels()
        assert kept_K is not None
        sliced[HIDDEN] = AxisCut(width=method.base.hidden, kept=kept_K)
    if sliced:
        slice_model(model, method, Cuts(sliced))
    trained = _let_train(model, method, recipe)
    return Ready(model=model, method=method, wide_parameters=wide_parameters, replaced=replaced, trained=trained)


def count_ready(base: Any, family: Family, recipe: TrainRecipe, shape: Mapping[str, int], total_steps: int) -> Ready:
    """The same for a base without storage. Nothing is measured there, since any indices are as good for counting.

    The arguments are those of `make_ready`.
    """
    model, method = adapt(base, family, recipe, shape, total_steps)
    wide_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with torch.device("cpu"):
        sizes = method.base
        kept: dict[str, Tensor] = {}
        for name, count in shape.items():
            axis = AXES[name]
            if method.stays_wide(recipe) is not None if name == HIDDEN else method.cuts_at_the_end:
                continue
            for line in [line_name(name, i) for i in range(sizes.layers)] if axis.per_layer else [name]:
                kept[line] = torch.arange(count)
        if kept:
            slice_model(model, method, Cuts.of(sizes, kept))
        trained = _let_train(model, method, recipe)
    return Ready(model=model, method=method, wide_parameters=wide_parameters, trained=trained)


def _let_train(model: nn.Module, method: Method, recipe: TrainRecipe) -> list[str]:
    """Let norms and weights be trained that the recipe names; the weights' names in the base."""
    trained = train_weights(model, method, recipe.train) if recipe.train != LORA else []
    if recipe.train_norms:
        train_norms(model, method)
    return trained


def _choose_layers(
    base: Any,
    recipe: TrainRecipe,
    shape: Mapping[str, int],
    batches: Sequence[dict[str, Tensor]],
    known: Mapping[str, Tensor],
) -> Tensor | None:
    """The layers that stay, int64, chosen on the base as it is stored; None if all do."""
    if LAYERS not in shape:
        return None
    if LAYERS in known:
        return known[LAYERS]
    choice = _choice(LAYERS, recipe)
    assert isinstance(choice, LayerChoice)
    kept = choice.keep(base, base.config.num_hidden_layers, batches, shape[LAYERS])
    same_on_all(kept.to(base.device), "which layers are kept")
    return kept


def _choice(axis: str, recipe: TrainRecipe) -> Choice:
    return choice_of(axis, {**method_of(recipe).choices, **recipe.choose})


def choose_on_the_model(
    base: Any,
    family: Family,
    recipe: TrainRecipe,
    shape: Mapping[str, int],
    batches: Sequence[dict[str, Tensor]],
    earlier: Earlier | None,
    folder: Path | None = None,
) -> dict[str, Tensor]:
    """int64 indices that stay, by line: of a resumed run, or of choices that look at the whole stored model."""
    if earlier is not None and earlier.kept:
        return dict(earlier.kept)
    if method_of(recipe).searches:
        searched = method_of(recipe).choose(recipe, base, family, shape, batches, folder)
        for line, kept in searched.items():
            same_on_all(kept.to(base.device), f"what is kept of {line}")
        return searched
    scored: dict[str, list[ModelChoice]] = {}
    for axis in shape:
        if AXES[axis].per_layer and isinstance(choice := _choice(axis, recipe), ModelChoice):
            scored.setdefault(choice.name, []).append(choice)
    sizes = ModelSizes.of(base.config.to_dict(), family)
    known: dict[str, Tensor] = {}
    for alike in scored.values():
        # One pass scores all axes.
        found = alike[0].importance(base, family, sizes, batches, [choice.axis for choice in alike])
        for axis, importance_LI in found.items():
            for layer, importance_I in enumerate(importance_LI):
                kept = largest(importance_I, shape[axis])
                known[line_name(axis, layer)] = same_on_all(kept.to(base.device), f"what is kept of {axis}").cpu()
    return known


def _choose_and_compensate(
    model: Any,
    method: Method,
    recipe: TrainRecipe,
    shape: Mapping[str, int],
    layers: Tensor | None,
    known: dict[str, Tensor],
    batches: Sequence[dict[str, Tensor]],
    earlier: Earlier | None,
) -> list[str]:
    """Choose inside the layers, and make up for what goes; returns the names of the linears with replaced weights."""
    sizes = method.base
    inner = {axis: count for axis, count in shape.items() if AXES[axis].per_layer}
    choices = {axis: _choice(axis, recipe) for axis in inner}
    stays = list(range(sizes.layers)) if layers is None else layers.tolist()
    refit = recipe.refit if recipe.compensate else "none"
    assert refit != "auto", "the recipe was not resolved"
    unknown = any(line_name(axis, layer) not in known for axis in inner for layer in stays)
    replaced: list[str] = []
    if earlier is not None and (earlier.weights or earlier.is_tuned):
        for name, weight in earlier.weights.items():
            _put_back(model.get_base_model(), name, weight)
            replaced.append(name.removesuffix(".weight"))
    elif batches and (unknown or recipe.compensate):
        found = compensate(
            model,
            method,
            batches,
            kept_K=method.kept_channels() if recipe.compensate else None,
            layers=stays,
            counts=inner,
            choices={axis: choice for axis, choice in choices.items() if isinstance(choice, InnerChoice)},
            known=known,
            refit=refit,
            shrinkage=recipe.refit_shrinkage,
        )
        known |= found.kept
        replaced = found.replaced
    if layers is not None:
        known[LAYERS] = layers
    method.chosen = Cuts.of(sizes, known)
    return replaced


def _put_back(base: Any, name: str, weight: Tensor) -> None:
    module: Any = base.get_submodule(name.removesuffix(".weight"))
    inner = getattr(module, "base_layer", module)
    inner.weight.data.copy_(weight)

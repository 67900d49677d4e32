"""From a loaded base to a model that is ready for its first step: the stages in the order that each needs.

`pat-train`, the notebook API and the pre-flight, which counts on a model without storage, all go this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pat_serve.family import Family
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import Method
from pat_serve.training.model.calibration import Calibration
from pat_serve.training.model.compensation import compensate
from pat_serve.training.model.insert import adapt
from pat_serve.training.model.norms import train_norms
from pat_serve.training.model.slicing import narrow_model


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A model before its first step.

    Attributes:
        model: the PEFT model.
        method: attached to it.
        wide_parameters: trained ones before the model was cut down, whose shapes a run's adapter and plan have.
    """

    model: nn.Module
    method: Method
    wide_parameters: int


def make_ready(
    base: Any,
    family: Family,
    recipe: TrainRecipe,
    target_width: int,
    total_steps: int,
    *,
    calibration: Calibration | None = None,
    compensate_on: Sequence[dict[str, Tensor]] = (),
    kept_K: Tensor | None = None,
) -> Ready:
    """Adapt a base, make up for the cut, cut the model down, and let the norms be trained, as the recipe says.

    Args:
        base: a causal language model of transformers; changed in place.
        family: its architecture.
        recipe: the run's settings, resolved.
        target_width: K.
        total_steps: optimizer steps of the whole run.
        calibration: of the base, for a method that wants one.
        compensate_on: the batches that LoRA's start is found on; none where it starts at nothing, or is about to be
            loaded from a checkpoint.
        kept_K: int64, ascending: the channels to cut down to, where they are not the method's.
    """
    num_layers = base.config.num_hidden_layers
    model, method = adapt(base, family, recipe, target_width, total_steps, calibration)
    wide_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if compensate_on and recipe.compensate:
        method.on_step(0)
        compensate(model, method, family, num_layers, compensate_on)
    if method.stays_wide(recipe) is None:
        narrow_model(model, method, num_layers, method.kept_channels() if kept_K is None else kept_K)
    if recipe.train_norms:
        train_norms(model, method, num_layers)
    return Ready(model=model, method=method, wide_parameters=wide_parameters)

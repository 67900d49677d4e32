"""Parameters that a recipe trains, counted before a weight is loaded, and the teacher's share of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.cut.rotation import untie_head
from pat_serve.shapes.parameters import parameters_at
from pat_serve.training.checks.memory import unties
from pat_serve.training.config import TrainRecipe
from pat_serve.training.groups import WEIGHTS, groups_of
from pat_serve.training.model.ready import count_ready
from pat_serve.training.model.weights import ALL


@dataclass(frozen=True, kw_only=True)
class TrainedParameters:
    """Trained parameters: LoRA's, the model's own, the method's; and LoRA's and the method's before the base is cut."""

    lora: int
    tuned: int
    method: int
    wide: int


def trained_parameters(
    checkpoint: Checkpoint, recipe: TrainRecipe, shape: Mapping[str, int], total_steps: int
) -> TrainedParameters:
    """Count what a recipe trains on the very modules, without storage.

    Args:
        checkpoint: the base.
        recipe: a resolved one.
        shape: what is kept, by axis.
        total_steps: of the run, which schedules of the method ask for.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    # Nothing is measured on the meta device, and what a calibration decides has no parameters.
    uncalibrated = recipe.model_copy(update={"rotate": "none", "mask_start": "zero"})
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
        base = AutoModelForCausalLM.from_config(config)
        if unties(checkpoint, recipe):
            untie_head(base)
        ready = count_ready(base, checkpoint.family, uncalibrated, shape, total_steps)
    trained = {name: parameter.numel() for name, parameter in ready.model.named_parameters() if parameter.requires_grad}
    lora = sum(count for name, count in trained.items() if ".lora_" in name)
    tuned = sum(count for name, count in trained.items() if WEIGHTS in groups_of(name))
    method = sum(trained.values()) - lora - tuned
    return TrainedParameters(lora=lora, tuned=tuned, method=method, wide=ready.wide_parameters)


def teacher_share(checkpoint: Checkpoint, recipe: TrainRecipe, student_parameters: int) -> float:
    """The teacher's forward pass as a share of a step, whose student has that and a backward pass.

    Frozen weights get no gradients of their own: LoRA's backward pass is one pass more, that of all weights two.
    """
    if not recipe.distillation_weight:
        return 0.0
    teacher = parameters_at(checkpoint, checkpoint.sizes)
    passes = 3 if recipe.train == ALL else 2
    return teacher / (teacher + passes * student_parameters)

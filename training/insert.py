"""From a base checkpoint to a model in training: load it, adapt its linears with LoRA, attach the method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pat_serve.architectures import HEAD
from pat_serve.checkpoint import Checkpoint
from pat_serve.rotation import rotate_model
from pat_serve.training.calibration import Calibration
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import METHODS, Method


def build_model(
    checkpoint: Checkpoint,
    recipe: TrainRecipe,
    dtype: torch.dtype,
    target_width: int,
    total_steps: int,
    measure: Callable[[nn.Module], Calibration],
) -> tuple[nn.Module, Method]:
    """Load the base, frozen, turned to its principal axes if the recipe says so, with LoRA and the method's modules.

    Args:
        checkpoint: the base.
        recipe: the run's settings; its seed must have been set before.
        dtype: of the frozen base weights; what is trained is float32.
        target_width: K.
        total_steps: optimizer steps of the whole run.
        measure: gives the calibration of the loaded base; called when the method wants one.

    Returns:
        the PEFT model and its method.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype, local_files_only=True)
    base.config.use_cache = False
    calibration = measure(base) if METHODS[recipe.method].wants_calibration(recipe) else None
    if calibration is not None and calibration.rotation_DD is not None:
        rotate_model(base, checkpoint.family, checkpoint.num_layers, calibration.rotation_DD)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=checkpoint.family.lora_targets() + ([HEAD] if recipe.lora_head else []),
    )
    model = get_peft_model(base, lora)
    method = METHODS[recipe.method](recipe, checkpoint.family, checkpoint.hidden_size, target_width, total_steps)
    method.calibration = calibration
    method.attach(model.get_base_model(), checkpoint.num_layers)
    if recipe.gradient_checkpointing and not method.modules():
        # The embedding's output needs a gradient for the recomputation to reach the adapters; an HSM gives it one.
        model.enable_input_require_grads()
    assert isinstance(model, nn.Module)
    return model, method

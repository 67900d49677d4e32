"""From a base checkpoint to a model in training: load it, adapt its linears with LoRA, attach the method."""

from __future__ import annotations

import torch
from torch import nn

from pat_serve.checkpoint import Checkpoint
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import METHODS, Method


def build_model(
    checkpoint: Checkpoint, recipe: TrainRecipe, dtype: torch.dtype, target_width: int, total_steps: int
) -> tuple[nn.Module, Method]:
    """Load the base, frozen, with LoRA and the method's modules.

    Args:
        checkpoint: the base.
        recipe: the run's settings; its seed must have been set before.
        dtype: of the frozen base weights; what is trained is float32.
        target_width: K.
        total_steps: optimizer steps of the whole run.

    Returns:
        the PEFT model and its method.
    """
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype, local_files_only=True)
    return adapt(base, checkpoint, recipe, target_width, total_steps)


def adapt(
    base: nn.Module, checkpoint: Checkpoint, recipe: TrainRecipe, target_width: int, total_steps: int
) -> tuple[nn.Module, Method]:
    """Give a loaded base (on any device, meta too) LoRA and the method's modules.

    Returns:
        the PEFT model around `base`, and its method.
    """
    from peft import LoraConfig, get_peft_model

    base.config.use_cache = False  # type: ignore[union-attr]  # transformers'
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=checkpoint.family.lora_targets(),
    )
    model = get_peft_model(base, lora)
    method = METHODS[recipe.method](recipe, checkpoint.family, checkpoint.hidden_size, target_width, total_steps)
    method.attach(model.get_base_model(), checkpoint.num_layers)
    if recipe.gradient_checkpointing and not method.modules():
        # The embedding's output needs a gradient for the recomputation to reach the adapters; an HSM gives it one.
        model.enable_input_require_grads()
    assert isinstance(model, nn.Module)
    return model, method

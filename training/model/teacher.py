"""The teacher of a distillation: the dense base, in memory a second time where the student is no longer a part of it.

A student that is the base with an adapter and a method's modules is its own teacher once both are switched off. One
that was cut down, or whose weights, norms or last gain are new, is not: the base is then loaded again, frozen, in the
dtype that it is trained in, and runs beside the student without gradients. It is whole in every process.
"""

from __future__ import annotations

from typing import Any

import torch

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import method_of


def is_own_teacher(recipe: TrainRecipe) -> bool:
    """Whether a run's model still contains the dense base.

    Args:
        recipe: the run's settings, resolved.
    """
    is_cut_down = method_of(recipe).stays_wide(recipe) is None or bool(recipe.inner_axes)
    is_refitted = bool(recipe.compensate) and recipe.refit == "full"
    is_changed = is_refitted or recipe.keeps_tie or recipe.train_norms or recipe.train != "lora"
    return not (is_cut_down or is_changed)


def holds_teacher(recipe: TrainRecipe) -> bool:
    """Whether a run holds the dense base beside what it trains."""
    return recipe.distillation_weight > 0 and not is_own_teacher(recipe)


def load_teacher(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Load the frozen dense base.

    Args:
        checkpoint: the base.
        dtype: of its weights and of what it computes.

    Returns:
        a causal language model of transformers in evaluation mode.
    """
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype, local_files_only=True)
    teacher.config.use_cache = False
    return teacher.eval().requires_grad_(False)

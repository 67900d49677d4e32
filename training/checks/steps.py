"""How many optimizer steps a run makes, and of how many rows each."""

from __future__ import annotations

import math

from pat_serve.training.config import TrainRecipe

# Micro-batches of a step, in falling order. Sixteen of eight rows are the published batch of 128.
_ACCUMULATIONS = (16, 8, 4, 2, 1)
# At equal tokens, SmolLM2-135M had 13 % less perplexity after 100 steps of 2 rows than after 7 of 32
# (docs/study_recovery.md).
# A run of fewer steps than these takes smaller ones.
LEAST_STEPS = 200


def with_accumulation(recipe: TrainRecipe, rows: int | None, processes: int) -> TrainRecipe:
    """The recipe with a number of micro-batches for each step, of its own or by the rows that there are.

    It is 16 where the data make at least 200 such steps, and smaller where they make fewer. It is 16 too where the
    steps are counted by the user, or where the rows of a stream are unknown.

    Args:
        recipe: whose method trains, or not.
        rows: of an epoch; None for a stream.
        processes: that train together.
    """
    from pat_serve.training.methods import METHODS

    unused = METHODS[recipe.method].unused
    if recipe.gradient_accumulation_steps is not None or "gradient_accumulation_steps" in unused:
        return recipe
    found = _ACCUMULATIONS[0]
    if recipe.max_steps is None and rows is not None:
        for found in _ACCUMULATIONS:
            if steps_of_epochs(recipe, rows, processes, found) >= LEAST_STEPS:
                break
    return recipe.model_copy(update={"gradient_accumulation_steps": found})


def steps_of_epochs(recipe: TrainRecipe, rows: int, processes: int, accumulation: int) -> int:
    """Optimizer steps of a recipe's epochs, at least 1.

    An epoch's last step may be a smaller one, as the Trainer takes it.

    Args:
        recipe: whose epochs and batch size count.
        rows: of an epoch.
        processes: that train together.
        accumulation: micro-batches of a step.
    """
    micro_batches = math.ceil(rows / (recipe.batch_size * processes))
    return max(1, round(recipe.epochs * math.ceil(micro_batches / accumulation)))

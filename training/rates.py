"""The peak learning rate of a recipe that names none."""

from __future__ import annotations

# Weights themselves want about a tenth of LoRA's rate.
_OF_WEIGHTS = 2e-4
# LoRA's optimum falls with the width: 5e-4 x (2000 / hidden) ** 0.781 for the Llama family, whatever the rank, where
# alpha over rank is 1 (LoRA Without Regret, 2025, with a fit over models of 1B to 70B).
_AT_2000 = 5e-4
_EXPONENT = 0.781
# The narrowest real model that it was measured on (docs/study.md); below that the rate stays.
_NARROWEST = 576


def default_rate(hidden_size: int, train: str) -> float:
    """The rate for a base, two digits of it.

    Args:
        hidden_size: channels of the base's residual stream.
        train: as in a recipe.
    """
    if train != "lora":
        return _OF_WEIGHTS
    return float(f"{_AT_2000 * (2000 / max(hidden_size, _NARROWEST)) ** _EXPONENT:.1e}")

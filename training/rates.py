"""The peak learning rate of a recipe that names none."""

from __future__ import annotations

# The rate falls with the width: for LoRA on the Llama family 5e-4 x (2000 / hidden) ** 0.781 (LoRA Without Regret,
# 2025). Theirs is an alpha of 32 whatever the rank. pat-train's alpha is the rank, which is the same at rank 32.
_OF_LORA_AT_2000 = 5e-4
_EXPONENT = 0.781
# The one real model that rates were measured on (docs/study_recovery.md). Below its width the rate stays.
_NARROWEST = 576
# The rate of weights was measured on the same model.
_OF_WEIGHTS = 2e-4


def default_rate(hidden_size: int, train: str) -> float:
    """The rate for a base, two digits of it.

    Args:
        hidden_size: channels of the base's residual stream.
        train: as in a recipe.
    """
    width = max(hidden_size, _NARROWEST)
    if train == "lora":
        rate = _OF_LORA_AT_2000 * (2000 / width) ** _EXPONENT
    else:
        rate = _OF_WEIGHTS * (_NARROWEST / width) ** _EXPONENT
    return float(f"{rate:.1e}")

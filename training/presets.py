"""Named sets of settings that a run begins with: what `--preset` and `PatConfig(preset=...)` stand for."""

from __future__ import annotations

from typing import Any

from pat_serve.errors import UsageError
from pat_serve.terminal.progress import say

# PAT as published, where the defaults are what measured best (docs/ablation.md).
PAPER: dict[str, Any] = {
    "rotate": "none",
    "mask_start": "zero",
    "gate": "anneal",
    "compensate": False,
    "lora_head": False,
    "distillation_weight": 0.0,
}

# The published rates, made for thirty thousand steps of 128 rows. A run of some hundred steps learns a fraction of what
# it could with them, pruned or dense (docs/study_toys.md, "Learning rate and LoRA's alpha").
PAPER_RATES: dict[str, Any] = {
    "learning_rate": 5e-5,
    "lora_alpha": 4.0,
    "lora_dropout": 0.05,
    "max_grad_norm": 0.3,
    "gradient_accumulation_steps": 16,
}

# The default until 2026-12. The recipes of runs from before then name it, whether or not somebody chose it.
FORMER_CALIBRATION_ROWS = 128

UNPRUNED: dict[str, Any] = {name: PAPER[name] for name in ("rotate", "mask_start", "gate", "compensate")}

PRESETS: dict[str, dict[str, Any]] = {"default": {}, "paper": PAPER | PAPER_RATES}


def preset_settings(name: str | None, old_name: str | None = None, option: str = "--preset") -> dict[str, Any]:
    """Give the settings of a preset; a recipe file and flags win over them.

    Args:
        name: a key of `PRESETS`; None is the default.
        old_name: the same, from somebody who still calls the option `recipe`. One line on stderr tells the new name.
        option: the option's name, for messages.

    Raises:
        UsageError: no preset has this name, or both names are given and differ.
    """
    old_option = option.replace("preset", "recipe")
    if old_name is not None:
        say(f"{old_option} is now called {option}; the old name still works.")
        if name not in (None, old_name):
            both = f"{name}, and {old_option} {old_name}"
            raise UsageError(option, expected="one preset", found=both, fix=f"Leave {old_option} out.")
    chosen = old_name or name or "default"
    if chosen not in PRESETS:
        raise UsageError(option, expected=" or ".join(PRESETS), found=chosen, fix="A recipe file goes to --config.")
    return PRESETS[chosen]

"""What the study compares, and the sweeps beside it."""

from __future__ import annotations

from typing import Any

from benchmarks.ablation.variants import SHARED, VARIANTS
from pat_serve.training.config import PAPER

DENSE = "dense LoRA"
# In the order of interest: whatever is finished early tells the most.
RATIOS = (0.25, 0.5, 0.125, 0.375)

METHODS: dict[str, dict[str, Any]] = {
    "PAT as published": VARIANTS["PAT as published"],
    "the default": VARIANTS["loss axes, cut, compensated, head (the default)"],
    "activation magnitude, then LoRA": VARIANTS["baseline: activation magnitude, cut, LoRA"],
    "LLM-Pruner score, then LoRA": VARIANTS["baseline: LLM-Pruner score, cut, LoRA"],
    "PCA slice, then LoRA": VARIANTS["baseline: PCA slice, cut, LoRA"],
}

# The paper leaves the operator's rank open, and the seeds ask what the identity loss is worth; each at all the ratios
# would be hours: the rank at a quarter of the width, the identity loss at a quarter and a half.
HIO_RANKS = (0, 8, 16, 32, 64)
SWEEPS: dict[str, dict[str, dict[str, Any]]] = {
    "hio": {
        **{f"PAT as published, HIO {rank}": {**PAPER, "hio_rank": rank} for rank in HIO_RANKS},
        **{f"the default, HIO {rank}": {**METHODS["the default"], "hio_rank": rank} for rank in HIO_RANKS},
    },
    "identity": {"PAT as published, no identity loss": {**METHODS["PAT as published"], "identity_weight": 0.0}},
}
SWEEP_RATIOS = {"hio": (0.25,), "identity": (0.25, 0.5)}


def settings(name: str, method: dict[str, Any], width: int | None) -> dict[str, Any]:
    """A recipe's settings.

    Args:
        name: of the method, for nothing but telling the dense one.
        method: what is its own.
        width: of the pruned model; None for the dense one.
    """
    own = {"method": "lora"} if name == DENSE else {**method, "hidden_size": width}
    return SHARED | own

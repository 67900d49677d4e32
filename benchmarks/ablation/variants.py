"""Variants to compare: the paper's recipe, each option alone, their combinations, and prune-then-tune baselines."""

from __future__ import annotations

from typing import Any

from pat_serve.training.presets import PAPER

# The budget and the widths that all share: equal steps, equal tokens, the same data order for the same seed.
SHARED: dict[str, Any] = {
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_length_tokens": 128,
    "learning_rate": 1e-3,
    "warmup_steps": 12,
    "max_grad_norm": 1.0,
    "lora_rank": 20,
    "lora_alpha": 20,
    "lora_dropout": 0.0,
    "dtype": "float32",
    "save_steps": 100_000,
    "logging_steps": 10,
}

_PAPER: dict[str, Any] = {**PAPER, "hio_rank": 32}
_CUT: dict[str, Any] = {**PAPER, "gate": "cut", "hio_rank": 0}
_AXES: dict[str, Any] = {"rotate": "energy", "mask_start": "energy"}
_LOSS_AXES: dict[str, Any] = {"rotate": "loss", "mask_start": "energy"}
# The recorded runs started LoRA where it makes up for the cut; that the weights do it is a later default.
_COMPENSATED: dict[str, Any] = {"gate": "cut", "compensate": True, "refit": "lora"}
_BEST: dict[str, Any] = {**_CUT, **_LOSS_AXES, **_COMPENSATED, "lora_head": True}

VARIANTS: dict[str, dict[str, Any]] = {
    "dense LoRA": {"method": "lora"},
    "dense LoRA, head": {"method": "lora", "lora_head": True},
    "dense LoRA, rank 64": {"method": "lora", "lora_rank": 64, "lora_alpha": 64},
    "dense LoRA, 2e-3": {"method": "lora", "learning_rate": 2e-3},
    "PAT as published": _PAPER,
    "baseline: activation magnitude, cut, LoRA": {**_CUT, "mask_start": "energy"},
    "baseline: LLM-Pruner score, cut, LoRA": {**_CUT, "mask_start": "gradient"},
    "baseline: PCA slice, cut, LoRA": {**_CUT, **_AXES},
    "PAT + energy start": {**_PAPER, "mask_start": "energy"},
    "PAT + principal axes": {**_PAPER, "rotate": "energy"},
    "PAT + principal axes + energy start": {**_PAPER, **_AXES},
    "PAT + loss axes + energy start": {**_PAPER, **_LOSS_AXES},
    "PAT + loss axes, gradual": {**_PAPER, **_LOSS_AXES, "gate": "gradual"},
    "loss axes, cut": {**_PAPER, **_LOSS_AXES, "gate": "cut"},
    "loss axes, cut, compensated": {**_PAPER, **_LOSS_AXES, **_COMPENSATED},
    "loss axes, cut, compensated, head (the default)": _BEST,
    "loss axes, cut, compensated, head, HIO 32": {**_BEST, "hio_rank": 32},
    "loss axes, cut, compensated, head, distilled": {**_BEST, "distillation_weight": 0.5},
    "the default, no head": {**_BEST, "lora_head": False},
    "the default, norms": {**_BEST, "train_norms": True},
    "the default, LoRA+ (B x4)": {**_BEST, "lr_scale": {"lora_b": 4.0}},
    "the default, LoRA+ (B x16)": {**_BEST, "lr_scale": {"lora_b": 16.0}},
    "the default, head x3": {**_BEST, "lr_scale": {"head": 3.0}},
    "the default, rank 64": {**_BEST, "lora_rank": 64, "lora_alpha": 64},
    "the default, rank 64, norms": {**_BEST, "lora_rank": 64, "lora_alpha": 64, "train_norms": True},
    "the default, rank 64, distilled": {**_BEST, "lora_rank": 64, "lora_alpha": 64, "distillation_weight": 0.5},
    "the default, 2e-3": {**_BEST, "learning_rate": 2e-3},
    "the default, measured on 512 rows": {**_BEST, "calibration_rows": 512},
    "the default, measured on 2048 rows": {**_BEST, "calibration_rows": 2048},
}

# On a base whose head is its embedding. A rotation unties it, so the same width has more parameters: it is also
# measured at the width (168) that has as many as the tied model at 192.
_TIED: dict[str, Any] = {**PAPER, "mask_start": "energy", "tied_embeddings": "keep"}
_UNTIED: dict[str, Any] = {**_BEST, "tied_embeddings": "untie"}

TIED_VARIANTS: dict[str, dict[str, Any]] = {
    "dense LoRA": {"method": "lora"},
    "tied, energy start, annealed": {**_TIED, "hio_rank": 32},
    "tied, energy start, cut": {**_TIED, "gate": "cut", "hio_rank": 0},
    "tied, energy start, cut, compensated": {**_TIED, **_COMPENSATED, "hio_rank": 0},
    "tied, energy start, cut, compensated, HIO 32": {**_TIED, **_COMPENSATED, "hio_rank": 32},
    "untied by its axes, same width": _UNTIED,
    "untied by its axes, same parameters": {**_UNTIED, "hidden_size": 168},
}

"""The state that `apply_pat` leaves on a model, for the callback and for saving."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.errors import UsageError
from pat_serve.training.config import TrainRecipe
from pat_serve.training.groups import GENERATOR
from pat_serve.training.methods import Method


@dataclass(kw_only=True)
class AppliedPat:
    """The handle `model.pat`: the method, what it was applied to, and where the Trainer is.

    Attributes:
        frozen_sha256: of the base's weights as they were handed to the Trainer, rotated or not.
        replaced: names in the base of the linears whose weights were replaced before the first step.
        samples: a few rows that the model was trained on.
        trained: the Trainer has come to its end.
        first_micro_batch: the next one is the first of its optimizer step.
    """

    method: Method
    recipe: TrainRecipe
    checkpoint: Checkpoint
    frozen_sha256: dict[str, str]
    replaced: Sequence[str] = ()
    samples: list[list[int]] = field(default_factory=list)
    trained: bool = False
    in_step: bool = False
    first_micro_batch: bool = True
    loss_multiplier: int = 1


def applied(model: Any) -> AppliedPat:
    """The handle of a model from `apply_pat`.

    Raises:
        UsageError: it is another one.
    """
    handle = getattr(model, "pat", None)
    if not isinstance(handle, AppliedPat):
        raise UsageError("the model", expected="one from apply_pat", found=type(model).__name__, fix="Call apply_pat.")
    return handle


def frozen_hashes(base: nn.Module, trained: frozenset[str] = frozenset()) -> dict[str, str]:
    """SHA-256 of every parameter of the base itself, by its name without peft's wrapper; without the trained ones."""
    return {
        name.replace(".base_layer.", "."): _sha256(parameter)
        for name, parameter in base.named_parameters()
        if ".lora_" not in name
        and ".hsm." not in name
        and not name.startswith(("pat_mask.", f"{GENERATOR}."))
        and name not in trained
    }


def _sha256(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()

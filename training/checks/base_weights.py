"""Check that a model that the user loaded is still the checkpoint on the disk."""

from __future__ import annotations

import torch
from torch import nn

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.errors import ChangedInput
from pat_serve.gguf.folder import sha256_of_folder


def require_same_weights(base: nn.Module, checkpoint: Checkpoint) -> None:
    """Check that the model in memory is the one on the disk, from which the export will start.

    Args:
        base: the model inside peft's wrapper, or before it has one.
        checkpoint: its files; compared in the model's dtype.

    Raises:
        ChangedInput: a tensor is missing or differs.
    """
    loaded = {name.replace(".base_layer.", "."): value for name, value in base.state_dict().items()}
    for name in checkpoint.tensors:
        present = loaded.get(name)
        if present is None and checkpoint.tied and name == "lm_head.weight":
            continue
        stored = checkpoint.read(name)
        if present is None or not torch.equal(present.detach().cpu(), stored.to(present.dtype)):
            raise ChangedInput(
                f"{checkpoint.source}: {name}",
                expected="the loaded model's weights",
                found="no such tensor in the model" if present is None else "other values",
                fix=_way_out(present, stored, checkpoint),
            )


def _way_out(present: torch.Tensor | None, stored: torch.Tensor, checkpoint: Checkpoint) -> str:
    from_gguf = sha256_of_folder(checkpoint.folder) is not None
    if present is not None and from_gguf and present.dtype != stored.dtype:
        return f"Load the model with dtype={stored.dtype}, in which the GGUF file is read here."
    return "Save the changed model with its tokenizer, and load it from there."

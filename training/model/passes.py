"""Passes of a base that is measured before the first step: its decoder alone, or its loss with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pat_serve.perplexity import IGNORED_LABEL


def run_decoder(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The states (B, T, D) that the head reads of a padded batch."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    states_BTD: Tensor = model.get_decoder()(**inputs).last_hidden_state
    return states_BTD


def summed_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The sum of the cross-entropy over a batch's labelled tokens, so that every token counts the same.

    Prompt tokens and padding, which no label follows, get no logits. The labels are shifted, and not the states.

    Args:
        model: a causal language model whose weights may all be frozen.
        batch: input_ids, attention_mask and labels.
    """
    # Where no weight of the base asks for a gradient, the gradient begins at the embedding's output.
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(
        lambda _m, _i, out: out.requires_grad_() if out.is_leaf and torch.is_grad_enabled() else out
    )
    try:
        next_BT = F.pad(batch["labels"].to(model.device)[:, 1:], (0, 1), value=IGNORED_LABEL)
        asked_BT = next_BT != IGNORED_LABEL
        asked_ND = run_decoder(model, batch)[asked_BT]
        # The logits are the largest tensor here, so no variable keeps them.
        return F.cross_entropy(model.get_output_embeddings()(asked_ND).float(), next_BT[asked_BT], reduction="sum")
    finally:
        handle.remove()


@contextmanager
def evaluating(model: Any, handles: list[RemovableHandle]) -> Iterator[None]:
    """Freeze a model in evaluation mode: gradients of all weights would be a second copy of the model.

    Args:
        model: thawed and set back at the end.
        handles: hooks that are removed at the end.
    """
    was_training = model.training
    unfrozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.train(was_training)
        for parameter in unfrozen:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()

"""Layers by the perplexity of the model without them, one shot, as in Shortened LLaMA (arXiv 2402.02834)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from pat_serve.terminal.progress import track
from pat_serve.training.choices.base import LayerChoice
from pat_serve.training.model.passes import evaluating, summed_loss

# Each layer takes a pass of its own, so a few thousand tokens have to do.
MOST_TOKENS = 4096


class Perplexity(LayerChoice):
    """A layer whose absence hurts the loss least is dropped first; each is judged in the whole model."""

    name: ClassVar[str] = "perplexity"

    def importance(self, model: Any, num_layers: int, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """The loss without the layer, summed over the first tokens."""
        few = first_tokens(batches)
        return torch.tensor([
            loss_without(model, few, [layer]) for layer in track(range(num_layers), "try without a layer", num_layers)
        ])  # fmt: skip


def first_tokens(batches: Sequence[dict[str, Tensor]], most: int = MOST_TOKENS) -> list[dict[str, Tensor]]:
    """The first batches up to a number of tokens; one at least."""
    few: list[dict[str, Tensor]] = []
    for batch in batches:
        if few and sum(int(one["attention_mask"].sum()) for one in [*few, batch]) > most:
            break
        few.append(batch)
    return few


@torch.no_grad()
def loss_without(model: Any, batches: Sequence[dict[str, Tensor]], layers: Sequence[int]) -> float:
    """The loss over all labelled tokens of a model whose layers of these numbers hand the stream on."""
    with evaluating(model, []), left_out(model, layers):
        return sum(float(summed_loss(model, batch)) for batch in batches)


@contextmanager
def left_out(model: Any, layers: Sequence[int]) -> Iterator[None]:
    """While it lasts, some layers hand the stream on as it came."""
    skipped = [model.get_submodule(f"model.layers.{i}") for i in layers]
    for layer in skipped:
        layer.forward = _hand_on
    try:
        yield
    finally:
        for layer in skipped:
            del layer.forward


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states

"""Layers by their influence on the stream: 1 - cos(what enters, what leaves), ShortGPT's score (arXiv 2403.03853)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pat_serve.training.choices.base import LayerChoice


class Influence(LayerChoice):
    """A layer that hardly turns the stream is dropped first."""

    name: ClassVar[str] = "influence"

    @torch.no_grad()
    def importance(self, model: Any, num_layers: int, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """Mean of 1 - cos over all real tokens."""
        total_L, tokens = torch.zeros(num_layers, dtype=torch.float64), 0
        real: Tensor

        def listen(layer: int, entering_BTD: Tensor, leaving: Any) -> None:
            leaving_BTD = leaving[0] if isinstance(leaving, tuple) else leaving
            cosines = F.cosine_similarity(entering_BTD[real].float(), leaving_BTD[real].float(), dim=-1)
            total_L[layer] += float((1 - cosines).double().sum())

        handles = [
            model.get_submodule(f"model.layers.{i}").register_forward_hook(
                lambda _m, inputs, settings, output, i=i: listen(
                    i, inputs[0] if inputs else settings["hidden_states"], output
                ),
                with_kwargs=True,
            )
            for i in range(num_layers)
        ]
        was_training = model.training
        model.eval()
        try:
            for batch in batches:
                ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
                real = mask.bool()
                tokens += int(mask.sum())
                model.get_decoder()(input_ids=ids, attention_mask=mask)
        finally:
            model.train(was_training)
            for handle in handles:
                handle.remove()
        return total_L / max(1, tokens)

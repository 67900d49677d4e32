"""Layers one after the other, each by the loss without it and those that went before (SLEB, arXiv 2402.09025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pat_serve.terminal.progress import track
from pat_serve.training.choices.base import LayerChoice
from pat_serve.training.choices.perplexity import first_tokens, loss_without


class Greedy(LayerChoice):
    """Costs a pass for each layer and each one that goes; the first two and the last two are no candidates."""

    name: ClassVar[str] = "greedy"

    def importance(self, model: Any, num_layers: int, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """The order in which all layers would go."""
        return self._order(model, num_layers, batches, list(range(num_layers)), num_layers)

    def keep(self, model: Any, num_layers: int, batches: Sequence[dict[str, Tensor]], count: int) -> Tensor:
        """Drop the layer that costs least, until `count` are left."""
        guarded = min(2, count // 2)
        candidates = list(range(guarded, num_layers - guarded))
        order_L = self._order(model, num_layers, batches, candidates, num_layers - count)
        return torch.nonzero(order_L == num_layers).flatten()

    def _order(
        self, model: Any, num_layers: int, batches: Sequence[dict[str, Tensor]], candidates: list[int], drops: int
    ) -> Tensor:
        """(L,): at which turn a layer goes, and `num_layers` for those that stay."""
        few, gone = first_tokens(batches), list[int]()
        order_L = torch.full((num_layers,), num_layers)
        for turn in track(range(drops), "drop one layer after the other", drops):
            left = [layer for layer in candidates if layer not in gone]
            worst = min(left, key=lambda layer: loss_without(model, few, [*gone, layer]))
            order_L[worst] = turn
            gone.append(worst)
        return order_L

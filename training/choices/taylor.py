"""FFN channels and key-value groups by the loss that a Taylor series expects without them (arXiv 2305.11627).

With g the gradient of the loss at a weight w, and F = E[g^2] over rows in the place of the second derivative:

- `taylor`: |w g|, the first order.
- `taylor-second`: w^2 F, the second.
- `taylor-mixed`: |w g - w^2 F / 2|, both.
- `taylor-vector`: |sum of w g| over a row or a column, where the others sum sizes.

Each layer is ranked by itself and all layers are cut. The authors leave the first and the last layers whole, and no
stock class holds their result.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pat_serve.families.family import Family
from pat_serve.perplexity import IGNORED_LABEL
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.terminal.progress import track
from pat_serve.training.choices.base import ModelChoice
from pat_serve.training.model.group_scores import GroupScores, members
from pat_serve.training.model.passes import evaluating, summed_loss

# Sums of gradients of so many layers are held at once; a larger model is passed over several times.
HELD_BYTES = 4_000_000_000


class _Sums:
    """Gradients of one weight, summed over rows in float32, and their squares where they are wanted."""

    def __init__(self, weight: Tensor, *, squares: bool) -> None:
        self.g_ON = torch.zeros_like(weight, dtype=torch.float32)
        self.gg_ON = torch.zeros_like(self.g_ON) if squares else None

    def add(self, gradient_ON: Tensor) -> None:
        gradient_ON = gradient_ON.float()
        self.g_ON += gradient_ON
        if self.gg_ON is not None:
            self.gg_ON += gradient_ON.square()


class Taylor(ModelChoice):
    """The first order: the loss of a model that is not at its minimum on these data."""

    name: ClassVar[str] = "taylor"
    by_row: ClassVar[bool] = False
    signed: ClassVar[bool] = False

    def score(self, weight_ON: Tensor, g_ON: Tensor, gg_ON: Tensor | None) -> Tensor:
        """A score of every weight from its gradient, and the mean square of the rows' gradients for some."""
        return (weight_ON * g_ON).abs()

    def importance(
        self, model: Any, family: Family, sizes: ModelSizes, batches: Sequence[dict[str, Tensor]], axes: Collection[str]
    ) -> dict[str, Tensor]:
        """Sum over the weights of each index; gradients are those of the mean loss of a token."""
        scores = GroupScores(sizes, axes)
        linears = list(members(family, sizes, axes))
        rows = [row for batch in batches for row in _single_rows(batch)] if self.by_row else list(batches)
        passes = _passes(model, linears, held_bytes=8 if self.by_row else 4)
        walk = [(mine, row) for mine in passes for row in [*rows, None]]
        sums: dict[str, _Sums] = {}
        for mine, row in track(walk, "score by gradients", len(walk)):
            weights = {name: model.get_submodule(name).weight for name, _, _ in mine}
            if row is not None:
                sums = sums or {name: _Sums(weight, squares=self.by_row) for name, weight in weights.items()}
                self._add(model, weights, row, sums)
                continue
            for name, spec, layer in mine:
                held = sums.pop(name)
                square_ON = None if held.gg_ON is None else held.gg_ON / len(rows)
                # A row's loss is its mean here, or else the sum over all tokens.
                count = len(rows) if self.by_row else sum(_labelled(batch) for batch in batches)
                score_ON = self.score(weights[name].detach().float(), held.g_ON / max(1, count), square_ON)
                scores.add(spec, layer, score_ON, signed=self.signed)
        return scores.totals

    def _add(self, model: Any, weights: dict[str, Any], row: dict[str, Tensor], sums: dict[str, _Sums]) -> None:
        handles: list[RemovableHandle] = []
        with evaluating(model, handles), torch.enable_grad():
            for name, weight in weights.items():
                weight.requires_grad_(True)

                def take(weight: Any, name: str = name) -> None:
                    # A gradient is used and dropped: all of them would be a second copy of the model.
                    sums[name].add(weight.grad)
                    weight.grad = None

                handles.append(weight.register_post_accumulate_grad_hook(take))
            loss = summed_loss(model, row)
            torch.autograd.backward(loss / max(1, _labelled(row)) if self.by_row else loss)
            for weight in weights.values():
                weight.requires_grad_(False)


class TaylorSecond(Taylor):
    """The second order alone: the loss of a model at its minimum."""

    name: ClassVar[str] = "taylor-second"
    by_row: ClassVar[bool] = True

    def score(self, weight_ON: Tensor, g_ON: Tensor, gg_ON: Tensor | None) -> Tensor:
        """w^2 F."""
        assert gg_ON is not None
        return weight_ON.square() * gg_ON


class TaylorMixed(Taylor):
    """Both orders."""

    name: ClassVar[str] = "taylor-mixed"
    by_row: ClassVar[bool] = True

    def score(self, weight_ON: Tensor, g_ON: Tensor, gg_ON: Tensor | None) -> Tensor:
        """|w g - w^2 F / 2|."""
        assert gg_ON is not None
        return (weight_ON * g_ON - weight_ON.square() * gg_ON / 2).abs()


class TaylorVector(Taylor):
    """The first order of a whole row or column, whose weights go together."""

    name: ClassVar[str] = "taylor-vector"
    signed: ClassVar[bool] = True

    def score(self, weight_ON: Tensor, g_ON: Tensor, gg_ON: Tensor | None) -> Tensor:
        """W g, with its sign."""
        return weight_ON * g_ON


def _labelled(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


def _single_rows(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of a padded batch, one by one, without their padding."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return [{name: tensor[at : at + 1, :length] for name, tensor in batch.items()} for at, length in enumerate(lengths)]


def _passes(model: Any, linears: Sequence[tuple[str, Any, int]], held_bytes: int) -> list[list[tuple[str, Any, int]]]:
    """Whole layers whose sums fit into `HELD_BYTES`, one list a pass; a layer at least.

    Args:
        model: whose weights are counted.
        linears: name, line in the table and layer.
        held_bytes: of each weight.
    """
    passes: list[list[tuple[str, Any, int]]] = []
    room = 0
    for layer in sorted({layer for _, _, layer in linears}):
        mine = [linear for linear in linears if linear[2] == layer]
        needed = held_bytes * sum(model.get_submodule(name).weight.numel() for name, _, _ in mine)
        if not passes or needed > room:
            passes.append([])
            room = HELD_BYTES
        passes[-1] += mine
        room -= needed
    return passes

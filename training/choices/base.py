"""Choices of the indices of an axis that stay: one file a choice, named in `CHOICES`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pat_serve.cut.axes import LAYERS
from pat_serve.families.family import Family
from pat_serve.shapes.sizes import ModelSizes


class Choice(ABC):
    """A way to choose what of an axis stays.

    Attributes:
        axis: the axis whose indices it chooses.
        name: its name in `--choose AXIS=NAME`; no other choice of the axis has it.
    """

    axis: ClassVar[str]
    name: ClassVar[str]


class LayerChoice(Choice):
    """Chooses layers on the whole model, before anything else of it is cut.

    The first two and the last two stay, where there are others to drop. What they do to the stream is unlike what the
    others do, whatever a score says.
    """

    axis: ClassVar[str] = LAYERS

    @abstractmethod
    def importance(self, model: Any, num_layers: int, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """A number for each layer (L,), on the CPU; layers with the largest stay.

        Args:
            model: the causal language model, as loaded.
            num_layers: L.
            batches: input_ids and attention_mask of rows of the training data.
        """

    def keep(self, model: Any, num_layers: int, batches: Sequence[dict[str, Tensor]], count: int) -> Tensor:
        """int64 (count,): the layers that stay, ascending. The arguments are those of `importance`."""
        importance_L = self.importance(model, num_layers, batches).double().clone()
        guarded = min(2, count // 2)
        if guarded:
            importance_L[:guarded] = importance_L[-guarded:] = torch.inf
        return largest(importance_L, count)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Inputs of a linear along the axis that is about to be cut.

    Attributes:
        second_II: sum over tokens of a a^T, float64, on the inputs that have passed all that was cut before.
        weight_OI: the linear's weight, float64.
        block: entries of each index: 1 for a channel of the FFN, all heads of a group for key-value groups.
    """

    second_II: Tensor
    weight_OI: Tensor
    block: int

    @property
    def length(self) -> int:
        """How many indices the axis has."""
        return len(self.second_II) // self.block

    def entries(self, index: int) -> slice:
        """Where the entries of an index lie."""
        return slice(index * self.block, (index + 1) * self.block)

    def inverse(self, ridge: float) -> Tensor:
        """(second + ridge * mean diagonal)^-1, float64."""
        ridge_I = second_diagonal_ridge(self.second_II, ridge)
        return torch.cholesky_inverse(torch.linalg.cholesky(self.second_II + torch.diag(ridge_I)))


class InnerChoice(Choice):
    """Chooses inside a layer, by what is read by the linear that loses inputs."""

    @abstractmethod
    def keep(self, inputs: Inputs, count: int) -> Tensor:
        """int64 (count,): the indices that stay, ascending."""


class ModelChoice(Choice):
    """Chooses inside all layers at once, on the whole model as it is stored, and ranks each layer by itself.

    So every layer keeps as many, and the result is a stock model.

    Args:
        axis: ffn or kv_groups.
    """

    def __init__(self, axis: str) -> None:
        # The axis belongs to the instance, since each of these choices serves both axes.
        self.axis = axis  # type: ignore[misc]  # the class variable of other choices

    @abstractmethod
    def importance(
        self, model: Any, family: Family, sizes: ModelSizes, batches: Sequence[dict[str, Tensor]], axes: Collection[str]
    ) -> dict[str, Tensor]:
        """A number for each index of each layer (L, I), on the CPU, by axis; indices with the largest stay.

        Args:
            model: the causal language model, as loaded.
            family: its architecture.
            sizes: of the model.
            batches: input_ids, attention_mask and labels of rows of the training data.
            axes: to score, of ffn and kv_groups, in one go.
        """


def second_diagonal_ridge(second_II: Tensor, ridge: float) -> Tensor:
    """A ridge (I,) of a share of a second moment's mean diagonal; above zero where all inputs are zero."""
    mean = float(second_II.diagonal().mean())
    return torch.full((len(second_II),), ridge * mean or 1.0, dtype=second_II.dtype, device=second_II.device)


def largest(importance: Tensor, count: int) -> Tensor:
    """int64 (count,), on the CPU: where the largest numbers stand, ascending; of equal ones the first."""
    order = torch.sort(importance.cpu(), descending=True, stable=True).indices
    return order[:count].sort().values

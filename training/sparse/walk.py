"""Make zeros layer after layer, on inputs that have passed all zeros before: one layer and the streams are in memory.

Within a layer the linears go in the order in which the stream meets them, and each sees the zeros of those before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pat_serve.families.family import Family
from pat_serve.training.model.branches import branches
from pat_serve.training.sparse.layers import Layers, Stream, advance, listen
from pat_serve.training.sparse.one_linear import Inputs, Zeroing, zeroed


@dataclass(frozen=True, kw_only=True)
class LinearFigures:
    """The outcome for one linear.

    Attributes:
        zeros: share of its entries that are zero.
        relative_error: mean squared error of its output on the calibration tokens, as a share of the dense output's
            mean square.
    """

    zeros: float
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class PrunedLayer:
    """A layer's new weights by their names in the checkpoint, in its dtypes, and their figures by module."""

    weights: dict[str, Tensor]
    figures: dict[str, LinearFigures]


class InputSums:
    """Sums over tokens of x and x x^T, float32, of a linear's inputs."""

    def __init__(self) -> None:
        self._tokens = 0
        self._second_II: Tensor | None = None
        self._first_I: Tensor | None = None

    def add(self, x_NI: Tensor) -> None:
        """Add a batch's tokens (N, I)."""
        x_NI = x_NI.float()
        self._tokens += len(x_NI)
        if self._second_II is None or self._first_I is None:
            self._second_II, self._first_I = x_NI.T @ x_NI, x_NI.sum(0)
        else:
            self._second_II.addmm_(x_NI.T, x_NI)
            self._first_I += x_NI.sum(0)

    def moments(self) -> Inputs:
        """The means over all tokens; the sums are given away."""
        assert self._second_II is not None
        assert self._first_I is not None
        inputs = Inputs(second_II=self._second_II.div_(self._tokens), mean_I=self._first_I / self._tokens)
        self._second_II = self._first_I = None
        return inputs


def groups_of_linears(family: Family, layer: int, num_layers: int) -> list[tuple[str, ...]]:
    """Names of a layer's linears in the order in which the stream meets them; those of a group have the same inputs."""
    walked, _ = branches(family, num_layers)
    groups: list[tuple[str, ...]] = []
    for branch in walked:
        if branch.layer == layer:
            assert branch.writer is not None
            groups += [branch.readers, (branch.writer,)]
    return groups


def prune_layers(
    layers: Layers,
    family: Family,
    num_layers: int,
    streams: Sequence[Stream],
    how: Sequence[Zeroing],
    done: Mapping[int, Mapping[str, Tensor]],
) -> Iterator[tuple[int, PrunedLayer | None]]:
    """Every layer's number with what became of it; None for a layer that was pruned before, which is only passed.

    Args:
        layers: of the base.
        family: its architecture.
        num_layers: of the base.
        streams: as the first layer reads them; they are taken along.
        how: for each layer.
        done: of a run that is resumed: the new weights of its first layers, read when they are asked for.
    """
    for number in range(num_layers):
        if number in done:
            with layers.layer(number, done[number]) as layer:
                advance(layer, streams)
            yield number, None
            continue
        with layers.layer(number) as layer:
            pruned = _prune(layer, number, groups_of_linears(family, number, num_layers), streams, how[number], layers)
            advance(layer, streams)
        yield number, pruned


@torch.no_grad()
def _prune(
    layer: nn.Module,
    number: int,
    groups: Sequence[Sequence[str]],
    streams: Sequence[Stream],
    how: Zeroing,
    layers: Layers,
) -> PrunedLayer:
    weights: dict[str, Tensor] = {}
    figures: dict[str, LinearFigures] = {}
    prefix = f"model.layers.{number}."
    for names in groups:
        linears = {name: layer.get_submodule(name.removeprefix(prefix)) for name in names}
        sums = InputSums()
        listen(layer, next(iter(linears.values())), streams, sums.add)
        inputs = sums.moments()
        for name, linear in linears.items():
            parameter = linear.weight
            assert isinstance(parameter, Tensor)
            dense_OI = layers.stored(f"{name}.weight")
            # Rounded as it will be stored, so that the next linear sees what an export has.
            stored_OI = zeroed(dense_OI, inputs, how).to(dense_OI.dtype)
            energy = inputs.error(dense_OI.float())
            figures[name] = LinearFigures(
                zeros=1 - int(stored_OI.count_nonzero()) / stored_OI.numel(),
                relative_error=inputs.error(stored_OI.float() - dense_OI.float()) / energy if energy else 0.0,
            )
            # The layer computes with the tensor that is kept, where both have one dtype and one place.
            weights[f"{name}.weight"] = stored_OI.cpu()
            parameter.data = stored_OI.to(parameter.device, parameter.dtype)
    return PrunedLayer(weights=weights, figures=figures)

"""The part of each axis that stays: the kept indices of a cut, and where they lie in a tensor's dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pat_serve.cut.axes import AXES, LAYERS, Axis, Dim, Piece
from pat_serve.errors import BrokenPlan
from pat_serve.shapes.sizes import ModelSizes

_SUBJECT = "the plan's cuts"
_FIX = "Repeat the training, or mend the method that wrote the plan."


@dataclass(frozen=True, kw_only=True)
class AxisCut:
    """Which indices of an axis stay.

    Attributes:
        width: length of the axis in the base.
        kept: int64 indices that stay, ascending, at least one.
    """

    width: int
    kept: Tensor

    def __post_init__(self) -> None:
        assert self.kept.dtype == torch.int64
        assert self.kept.dim() == 1

    @property
    def is_identity(self) -> bool:
        """Whether every index stays, in order."""
        return len(self.kept) == self.width


class Cuts(Mapping[str, AxisCut]):
    """The cuts of a plan by line: `hidden`, `layers`, and `ffn.7`, `kv_groups.7` for the layers that stay.

    Layers are numbered as in the base. An axis without a line is whole.

    Args:
        lines: the cuts by line.

    Raises:
        BrokenPlan: a line is of no axis.
    """

    def __init__(self, lines: Mapping[str, AxisCut] | None = None) -> None:
        self._lines = dict(lines or {})
        for line in self._lines:
            parse_line(line)

    @staticmethod
    def of(base: ModelSizes, kept: Mapping[str, Tensor]) -> Cuts:
        """The cuts of a base by the indices that stay.

        Lines of layers that are dropped are left out, so that a method can choose inside all of them.

        Args:
            base: its sizes.
            kept: int64 indices, ascending, by line.

        Raises:
            BrokenPlan: as `sizes`.
        """
        layers = set(kept[LAYERS].tolist()) if LAYERS in kept else set(range(base.layers))
        lines = {}
        for line, indices in kept.items():
            axis, layer = parse_line(line)
            if layer is None or layer in layers:
                lines[line] = AxisCut(width=axis.length(base), kept=indices)
        cuts = Cuts(lines)
        cuts.sizes(base)
        return cuts

    def __getitem__(self, line: str) -> AxisCut:
        return self._lines[line]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def is_identity(self) -> bool:
        """Whether every index stays, in order."""
        return all(cut.is_identity for cut in self.values())

    def line(self, axis: str, layer: int | None, base: ModelSizes) -> AxisCut:
        """The cut of an axis; this layer's, where layers choose for themselves. Without a line it is the whole axis."""
        found = self.get(line_name(axis, layer))
        if found is not None:
            return found
        width = AXES[axis].length(base)
        return AxisCut(width=width, kept=torch.arange(width))

    def layers_kept(self, layers: int) -> list[int]:
        """The layers that stay, as the base numbers them.

        Args:
            layers: number of the base's.
        """
        return [int(i) for i in self[LAYERS].kept] if LAYERS in self else list(range(layers))

    def positions(self, dim: Dim, layer: int | None, base: ModelSizes) -> Tensor | None:
        """Where the kept entries of a tensor's dimension lie.

        Args:
            dim: the dimension, from the architecture table.
            layer: the tensor's layer as the base numbers it; None outside the layers.
            base: sizes of the base.

        Returns:
            int64 positions, ascending; None where the whole dimension stays.
        """
        if all(self._whole(piece, layer) for piece in dim):
            return None
        found, start = [], 0
        for piece in dim:
            length, block = piece.length(base), piece.block(base)
            cut = self.get(line_name(piece.axis, layer)) if piece.axis in AXES else None
            kept = torch.arange(length // block) if cut is None else cut.kept
            found.append(start + (kept[:, None] * block + torch.arange(block)).flatten())
            start += length
        return torch.cat(found)

    def _whole(self, piece: Piece, layer: int | None) -> bool:
        cut = self.get(line_name(piece.axis, layer)) if piece.axis in AXES else None
        return cut is None or cut.is_identity

    def counts(self, base: ModelSizes) -> dict[str, int]:
        """How many indices of each axis stay, for the axes that have a line.

        Args:
            base: sizes of the base.

        Raises:
            BrokenPlan: a line does not fit the base, or the counts of an axis differ from layer to layer.
        """
        kept_layers = self.layers_kept(base.layers)
        found: dict[str, dict[int, int]] = {}
        for line, cut in self.items():
            axis, layer = parse_line(line)
            width, kept = axis.length(base), cut.kept
            if cut.width != width:
                raise _broken(f"{line} of width {width}, the base's", f"{cut.width}")
            if not len(kept) or bool((kept[1:] <= kept[:-1]).any()) or int(kept[0]) < 0 or int(kept[-1]) >= width:
                raise _broken(f"1 to {width} ascending indices below {width} for {line}", _told(kept))
            if layer is not None and layer not in kept_layers:
                raise _broken(f"lines of layers that stay: {_told(kept_layers)}", line)
            found.setdefault(axis.name, {})[layer or 0] = len(kept)
        for name, by_layer in found.items():
            if not AXES[name].per_layer:
                continue
            if lacking := [i for i in kept_layers if i not in by_layer]:
                raise _broken(f"a cut of {name} in every layer that stays, or in none", f"none in layer {lacking[0]}")
            if len(set(by_layer.values())) > 1:
                uneven = ", ".join(f"{count} in layer {i}" for i, count in _extremes(by_layer))
                raise _broken(f"the same count of {name} in every layer, as config.json has one for all", uneven)
        return {name: next(iter(by_layer.values())) for name, by_layer in found.items()}

    def sizes(self, base: ModelSizes) -> ModelSizes:
        """The sizes of the cut model.

        Args:
            base: sizes of the base.

        Raises:
            BrokenPlan: as `counts`.
        """
        return base.with_counts(self.counts(base))


def line_name(axis: str, layer: int | None) -> str:
    """The line of an axis in a layer: `ffn.7`, or `hidden` whatever the layer."""
    return f"{axis}.{layer}" if AXES[axis].per_layer else axis


def parse_line(line: str) -> tuple[Axis, int | None]:
    """The axis of a line, and its layer where the axis has a line for each.

    Raises:
        BrokenPlan: the axis is unknown, or a layer stands where none belongs, or is missing.
    """
    name, _, number = line.partition(".")
    axis = AXES.get(name)
    layer = int(number) if number.isascii() and number.isdecimal() else None
    # Written otherwise ("ffn.07"), a layer could have two lines.
    if axis is None or line != line_name(name, layer) or (axis.per_layer and layer is None):
        known = ", ".join(f"{known}.{{layer}}" if AXES[known].per_layer else known for known in AXES)
        raise _broken(f"lines of the axes {known}", f"{line!r:.80}")
    return axis, layer if axis.per_layer else None


def _extremes(by_layer: Mapping[int, int]) -> list[tuple[int, int]]:
    """Layer and count of the smallest and the largest count."""
    return [choose(by_layer.items(), key=lambda entry: entry[1]) for choose in (min, max)]


def _told(indices: Tensor | Iterable[int]) -> str:
    numbers = [int(i) for i in indices]
    return (", ".join(map(str, numbers[:8])) or "none") + (", ..." if len(numbers) > 8 else "")


def _broken(expected: str, found: str) -> BrokenPlan:
    return BrokenPlan(_SUBJECT, expected=expected, found=found, fix=_FIX)

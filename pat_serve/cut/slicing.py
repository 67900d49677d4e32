"""The part of every tensor that a cut keeps, and its name in the cut model: export and training share this mapping.

No weight is read or computed here: what the kept entries hold (folds, factors of a narrower stream) is the business of
whoever slices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from pat_serve.cut.cuts import Cuts
from pat_serve.families.family import Family, TensorSpec
from pat_serve.shapes.sizes import ModelSizes


@dataclass(frozen=True, kw_only=True)
class Target:
    """One tensor of a cut model, and where it comes from.

    Attributes:
        name: in the cut model, whose layers are numbered anew.
        source: its name in the base.
        spec: its line in the architecture table.
        layer: as the base numbers it; None outside the layers.
        kept: for each dimension the int64 positions that stay, ascending; None where the whole dimension does.
        shape: in the cut model.
        base_shape: in the base.
    """

    name: str
    source: str
    spec: TensorSpec
    layer: int | None
    kept: tuple[Tensor | None, ...]
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether every entry of the tensor stays."""
        return all(positions is None for positions in self.kept)

    def take(self, tensor: Tensor) -> Tensor:
        """The kept entries of a tensor in the base's shape."""
        for dimension, positions in enumerate(self.kept):
            if positions is not None:
                tensor = tensor.index_select(dimension, positions.to(tensor.device))
        return tensor

    def widen(self, tensor: Tensor, fill: float = 0.0) -> Tensor:
        """A tensor of the cut model in the base's shape, with another value in the places that are cut."""
        for dimension, positions in enumerate(self.kept):
            if positions is not None:
                shape = list(tensor.shape)
                shape[dimension] = self.base_shape[dimension]
                wide = tensor.new_full(shape, fill)
                tensor = wide.index_copy_(dimension, positions.to(tensor.device), tensor)
        return tensor


def targets(family: Family, cuts: Cuts, base: ModelSizes, names: Iterable[str]) -> dict[str, Target | None]:
    """Map each tensor of the base to its place in the cut model.

    Args:
        family: the base's.
        cuts: of a plan.
        base: sizes of the base.
        names: of its tensors.

    Returns:
        a target for every name, in their order; None for a tensor of a layer that is dropped.

    Raises:
        BrokenPlan: the cuts do not fit the base.
        UnknownTensor: the family has no such tensor.
    """
    cut = cuts.sizes(base)
    numbers = {layer: number for number, layer in enumerate(cuts.layers_kept(base.layers))}
    found: dict[str, Target | None] = {}
    for name in names:
        spec, layer, kind = family.match(name)
        if layer is not None and layer not in numbers:
            found[name] = None
            continue
        found[name] = Target(
            name=name if layer is None else f"{spec.module.format(i=numbers[layer])}.{kind}",
            source=name,
            spec=spec,
            layer=layer,
            kept=tuple(cuts.positions(dim, layer, base) for dim in spec.dims_of(kind)),
            shape=spec.shape(kind, cut),
            base_shape=spec.shape(kind, base),
        )
    return found

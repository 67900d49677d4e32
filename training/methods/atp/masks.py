"""Masks over FFN channels and key-value groups of a model that is as wide as its base.

Two forms. `exact`: the input of the linear that writes to the stream is masked, base and adapter alike, which is what
the cut model computes. `leaking`, while it trains and decides: the base's own products are masked, at every linear of
an index, and the adapter's are not. So what LoRA does at a removed index still gets a gradient, the group lasso sees
it, and an index can come back.

Shape suffixes: L layers, I indices of an axis, O outputs, N inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pat_serve.cut.axes import Dim
from pat_serve.families.family import Family
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.training.model.group_scores import members


class GroupMasks:
    """The masks in force, and the hooks that apply them.

    Args:
        model: the base model inside peft's wrapper, its linears adapted.
        family: its architecture.
        sizes: of the base.
        axes: that are masked.
    """

    def __init__(self, model: nn.Module, family: Family, sizes: ModelSizes, axes: Collection[str]) -> None:
        self.sizes = sizes
        # (L, I) by axis; none: nothing is masked.
        self.values: Mapping[str, Tensor] = {}
        self.leaks = False
        # The adapted linears of each layer, with their dimensions.
        self.linears: list[tuple[Any, tuple[Dim, ...], int]] = []
        for name, spec, layer in members(family, sizes, axes):
            linear: Any = model.get_submodule(name)
            outputs, inputs = spec.dims
            self.linears.append((linear, spec.dims, layer))
            own = getattr(linear, "base_layer", linear)
            if spec.writes_residual:
                linear.register_forward_pre_hook(_MaskInputs(self, inputs, layer, leaking=False))
                own.register_forward_pre_hook(_MaskInputs(self, inputs, layer, leaking=True))
            else:
                own.register_forward_hook(_MaskOutputs(self, outputs, layer))

    def spread(self, dim: Dim, layer: int) -> Tensor | None:
        """A layer's mask over the entries of a dimension; None if nothing along it is masked."""
        parts = [
            self.values[piece.axis][layer].repeat_interleave(piece.block(self.sizes))
            for piece in dim
            if piece.axis in self.values
        ]
        assert len(parts) in (0, len(dim))
        return torch.cat(parts) if parts else None

    def lasso(self) -> Tensor:
        """Sum over removed indices of the norm of all that LoRA has there: rows of B, columns of A."""
        squares = {axis: [torch.zeros_like(row_I) for row_I in mask_LI] for axis, mask_LI in self.values.items()}
        for linear, dims, layer in self.linears:
            for dim, half, dimension in ((dims[0], "lora_B", 1), (dims[1], "lora_A", 0)):
                for factor in getattr(linear, half, {}).values():
                    start, summed = 0, factor.weight.square().sum(dimension)
                    for piece in dim:
                        length, block = piece.length(self.sizes), piece.block(self.sizes)
                        if piece.axis in squares:
                            mine_I = summed[start : start + length].view(-1, block).sum(1)
                            squares[piece.axis][layer] = squares[piece.axis][layer] + mine_I
                        start += length
        # The root of zero has no gradient.
        terms = [
            ((1 - mask_LI) * (torch.stack(squares[axis]) + 1e-12).sqrt()).sum() for axis, mask_LI in self.values.items()
        ]
        return torch.stack(terms).sum()


class _MaskInputs:
    def __init__(self, masks: GroupMasks, dim: Dim, layer: int, *, leaking: bool) -> None:
        self.masks, self.dim, self.layer, self.leaking = masks, dim, layer, leaking

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        leaks = self.masks.leaks and module.training
        mask_N = self.masks.spread(self.dim, self.layer) if leaks == self.leaking else None
        return None if mask_N is None else (inputs[0] * mask_N.to(inputs[0].dtype), *inputs[1:])


class _MaskOutputs:
    def __init__(self, masks: GroupMasks, dim: Dim, layer: int) -> None:
        self.masks, self.dim, self.layer = masks, dim, layer

    def __call__(self, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        leaks = self.masks.leaks and module.training
        mask_O = self.masks.spread(self.dim, self.layer) if leaks else None
        return None if mask_O is None else output * mask_O.to(output.dtype)

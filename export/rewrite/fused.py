"""Merge, fold and cut one weight, as pure maths in two thin products on what stays: an export's time is made of these.

Shape suffixes: D hidden_size, K kept channels, R rank of the hybrid operator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pat_serve.cut.hybrid import HybridFold
from pat_serve.export.run.adapter import LoraUpdate
from pat_serve.families.family import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Everything that is merged into one weight, folded into it and cut from it.

    T (W + c B A) on the rows K is s (W[K] + L1[K] (L0 W) + B'[K] A) with B' = c (B + L1 L0 B), and in the same way on
    the columns of a weight whose last axis is the hidden one.

    Attributes:
        first: the hidden axis is the weight's first.
        kept: int64 indices K of the hidden axis.
        l0_RD: the operator's first factor; None where it has no rank.
        l1_KR: the kept rows of its second one.
        along: the update's half along the hidden axis, (K, r) or (r, K), scaled and folded; None without an update.
        across: its other half, (r, n) or (n, r).
        scale_K: s of the kept channels; None without an operator.
    """

    first: bool
    kept: Tensor
    l0_RD: Tensor | None = None
    l1_KR: Tensor | None = None
    along: Tensor | None = None
    across: Tensor | None = None
    scale_K: Tensor | None = None

    def part(self, start: int, stop: int) -> Fused:
        """The same for a run of columns where the hidden axis is the first, of rows where it is the last."""
        if self.across is None:
            return self
        return replace(self, across=self.across[:, start:stop] if self.first else self.across[start:stop])

    def apply(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """The kept rows or columns of a weight, or of a bias along the hidden axis, with everything folded in.

        Args:
            weight: in the dtype to compute in.
            out: memory for the result; new memory by default, and for a bias.
        """
        if weight.dim() == 1:
            return self.apply(weight[:, None])[:, 0]
        dimension = 0 if self.first else 1
        if out is None:
            narrow = weight.index_select(dimension, self.kept)
        else:
            narrow = torch.index_select(weight, dimension, self.kept, out=out)
        if self.l0_RD is not None and self.l1_KR is not None:
            if self.first:
                narrow.addmm_(self.l1_KR, self.l0_RD @ weight)
            else:
                narrow.addmm_(weight @ self.l0_RD.T, self.l1_KR.T)
        if self.along is not None and self.across is not None:
            narrow.addmm_(*((self.along, self.across) if self.first else (self.across, self.along)))
        if self.scale_K is not None:
            narrow.mul_(self.scale_K[:, None] if self.first else self.scale_K)
        return narrow


def fuse(spec: TensorSpec, kept: Tensor, fold: HybridFold | None, update: LoraUpdate | None) -> Fused:
    """Compute the parts of `Fused` once for a weight.

    Args:
        spec: the weight's line in the architecture table; one of its axes is the hidden one.
        kept: int64 indices of the hidden axis.
        fold: the operator that follows the module, for a residual writer; in the dtype to compute in.
        update: the LoRA update of the module, in the dtype to compute in; never for a bias.
    """
    first = spec.hidden_dimension == 0
    ranked = fold if fold is not None and fold.rank else None
    along = across = None
    if update is not None:
        along, across = (update.b_OR, update.a_RI) if first else (update.a_RI, update.b_OR)
        along = along * update.scaling
        if ranked and first:
            along = torch.addmm(along, ranked.l1_DR, ranked.l0_RD @ along)
        elif ranked:
            along = torch.addmm(along, along @ ranked.l0_RD.T, ranked.l1_DR.T)
        along = along.index_select(0 if first else 1, kept)
    return Fused(
        first=first,
        kept=kept,
        l0_RD=ranked.l0_RD if ranked else None,
        l1_KR=ranked.l1_DR.index_select(0, kept) if ranked else None,
        along=along,
        across=across,
        scale_K=None if fold is None else fold.scale_D[kept],
    )

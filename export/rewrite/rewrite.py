"""The exact rewriting of a pruned model, tensor by tensor, as pure maths.

With K the kept channels of the hidden dimension, D its old and d = |K| its new width, T = diag(s)(I + L1 L0) and
f = sqrt(D / d): a wide stream that is zero outside K has an RMS that is f times smaller than its kept part's, so the
narrow norm's gain takes a factor f and its eps a factor D / d, and then both models compute the same function.

What families add, each exact:
- norms that multiply by 1 + w (Gemma) store f (1 + w) - 1;
- an embedding that is multiplied by sqrt(hidden_size) (Gemma) takes the ratio of the two widths' factors, e;
- norms over each head share the eps: RMSNorm(f x) with eps f^2 is RMSNorm(x) with eps, so q_proj and k_proj take f;
- a tied head that stays tied reads rows that carry s and e, so the final norm's gain is divided by both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pat_serve.architectures import EMBEDDING
from pat_serve.cuts import AxisCut
from pat_serve.export.run.adapter import LoraUpdate
from pat_serve.family import TensorSpec
from pat_serve.hybrid import HybridFold


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Merge, fold and cut of one weight, in two thin products on what stays: an export's time is made of these.

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
    """What `Fused` needs, computed once for a weight.

    Args:
        spec: the weight's line in the architecture table; one of its dimensions is the hidden one.
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


def norm_gain_factor(cut: AxisCut) -> float:
    """f = sqrt(D / d)."""
    return math.sqrt(cut.width / len(cut.kept))


def narrow_eps(eps: float, cut: AxisCut) -> float:
    """rms_norm_eps of the narrow model: eps * D / d."""
    return eps * cut.width / len(cut.kept)


def embedding_factor(cut: AxisCut, dtype: torch.dtype) -> float:
    """e: what a scaled embedding loses by sqrt(d) in place of sqrt(D), both as a model of this dtype rounds them.

    In bfloat16 the square roots of 2048 and 1536 are 45.25 and 39.25: e by the exact ones would be off by 0.13 %.
    """
    wide, narrow = torch.tensor([cut.width, len(cut.kept)], dtype=torch.float64).sqrt().to(dtype).tolist()
    return float(wide / narrow)


def rewrite_tensor(
    tensor: Tensor,
    spec: TensorSpec,
    cut: AxisCut,
    fused: Fused | None,
    *,
    norm_offset: float = 0.0,
    embedding: float = 1.0,
    tied_scale_K: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One tensor of the narrow model from the wide model's.

    Args:
        tensor: weight or bias, already in the dtype to compute in (float32 or better).
        spec: its line in the architecture table.
        cut: the hidden axis.
        fused: what is merged, folded and cut, for a tensor with a hidden axis that is no norm's.
        norm_offset: the family's.
        embedding: e, 1 where the embedding is not scaled.
        tied_scale_K: for the final norm of a model whose head stays tied, the s of the kept channels.
        out: memory that the result may be put in.

    Returns:
        the rewritten tensor in the same dtype.
    """
    if spec.hidden_norm:
        factor: Tensor | float = norm_gain_factor(cut)
        if tied_scale_K is not None:
            factor = factor / (embedding * tied_scale_K)
        # factor * (offset + w) - offset, in a form that leaves w as it is where the factor is 1.
        return tensor[cut.kept] * factor + norm_offset * (factor - 1)
    if fused is not None:
        tensor = fused.apply(tensor, out)
    if spec.module == EMBEDDING:
        tensor = tensor * embedding if embedding != 1.0 else tensor
    if spec.head_norm:
        tensor = tensor * norm_gain_factor(cut)
    return tensor

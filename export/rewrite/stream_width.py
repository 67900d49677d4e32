"""Changes that the narrower stream makes beside the cut itself, tensor by tensor, as pure maths.

With K the kept channels of the hidden dimension, D its old and d = |K| its new width, T = diag(s)(I + L1 L0) and
f = sqrt(D / d): a wide stream that is zero outside K has an RMS that is f times smaller than its kept part's, so the
narrow norm's gain takes a factor f and its eps a factor D / d, and then both models compute the same function.

Families add these, each exact:
- norms that multiply by 1 + w (Gemma) store f (1 + w) - 1;
- an embedding that is multiplied by sqrt(hidden_size) (Gemma) takes the ratio of the two widths' factors, e;
- norms over each head share the eps: RMSNorm(f x) with eps f^2 is RMSNorm(x) with eps, so q_proj and k_proj take f;
- a tied head that stays tied reads rows that carry s and e, so the final norm's gain is divided by both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pat_serve.cut.cuts import AxisCut
from pat_serve.export.rewrite.fused import Fused
from pat_serve.families.architectures import EMBEDDING
from pat_serve.families.family import TensorSpec


def norm_gain_factor(cut: AxisCut) -> float:
    """f = sqrt(D / d)."""
    return math.sqrt(cut.width / len(cut.kept))


def exported_eps(eps: float, cut: AxisCut) -> float:
    """rms_norm_eps of the exported model: eps * D / d."""
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

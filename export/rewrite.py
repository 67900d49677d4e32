"""The exact rewriting of a pruned model, tensor by tensor, as pure maths.

With K the kept channels of the hidden dimension, D its old and d = |K| its new width, T = diag(s)(I + L1 L0) and
f = sqrt(D / d): a wide stream that is zero outside K has an RMS that is f times smaller than its kept part's, so the
narrow norm's gain takes a factor f and its eps a factor D / d, and then both models compute the same function.
"""

from __future__ import annotations

import math

from torch import Tensor

from pat_serve.architectures import HIDDEN, TensorSpec
from pat_serve.export.reader import LoraUpdate
from pat_serve.hybrid import HybridFold, fold_columns, fold_rows
from pat_serve.plan import AxisCut


def merge_lora(weight_OI: Tensor, update: LoraUpdate) -> Tensor:
    """W + scaling * B A, in the weight's dtype."""
    dtype = weight_OI.dtype
    return weight_OI + update.scaling * (update.b_OR.to(dtype) @ update.a_RI.to(dtype))


def norm_gain_factor(cut: AxisCut) -> float:
    """f = sqrt(D / d)."""
    return math.sqrt(cut.width / len(cut.kept))


def narrow_eps(eps: float, cut: AxisCut) -> float:
    """rms_norm_eps of the narrow model: eps * D / d."""
    return eps * cut.width / len(cut.kept)


def rewrite_tensor(
    tensor: Tensor, spec: TensorSpec, cut: AxisCut, fold: HybridFold | None, update: LoraUpdate | None
) -> Tensor:
    """One tensor of the narrow model from the wide model's.

    Args:
        tensor: weight or bias, already in the dtype to compute in (float32 or better).
        spec: its line in the architecture table.
        cut: the hidden axis.
        fold: the operator that follows its module, for a residual writer.
        update: the LoRA update of its module; never for a bias.

    Returns:
        the rewritten tensor in the same dtype.
    """
    if update is not None:
        tensor = merge_lora(tensor, update)
    if spec.hidden_norm:
        return tensor[cut.kept] * norm_gain_factor(cut)
    if fold is not None:
        fold = fold.to(tensor.dtype)
        # An embedding holds the hidden axis last, a linear first; a bias has only the first.
        tensor = fold_columns(tensor, fold) if spec.axes[-1] == HIDDEN else fold_rows(tensor, fold)
    for dimension, axis in enumerate(spec.axes[: tensor.dim()]):
        if axis == HIDDEN:
            tensor = tensor.index_select(dimension, cut.kept)
    return tensor

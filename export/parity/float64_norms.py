"""RMSNorms that compute in float64 where the model does; transformers' own round to float32 whatever the dtype."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def compute_norms_in_float64(model: nn.Module, norm_offset: float) -> None:
    """Give a float64 model norms that are as exact as the rest of it.

    Args:
        model: a model of any family in the table; its norms are modules of a class called ...RMSNorm.
        norm_offset: the family's: a norm multiplies by norm_offset + its weight.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = float(getattr(module, "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"))
            # The instance's method comes before the class's, and hooks run as before.
            module.forward = partial(_rms_norm, module, eps=eps, offset=norm_offset)


def _rms_norm(module: nn.Module, x: Tensor, *, eps: float, offset: float) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    assert x.dtype == weight.dtype == torch.float64
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + weight)

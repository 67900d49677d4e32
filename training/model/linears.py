"""A linear as compensation sees it: plain or in peft's wrapper, its weight, and the start of its adapter.

Shape suffixes: D hidden_size, K kept inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pat_serve.cut.rotation import ROWS_AT_ONCE
from pat_serve.training.model.least_squares import low_rank_update


def unwrapped(linear: Any) -> Any:
    """The linear inside peft's wrapper, or itself."""
    return getattr(linear, "base_layer", linear)


def weight_of(linear: Any) -> Tensor:
    """The weight (O, I) of a linear, without its adapter."""
    weight: Tensor = unwrapped(linear).weight
    return weight


def is_tied(base: Any, weight: Tensor) -> bool:
    """Whether a weight is the embedding's own."""
    return base.get_input_embeddings().weight is weight


def start_lora(linear: Any, felt_OK: Tensor, factor_KK: Tensor, kept_K: Tensor) -> None:
    """Let a linear's adapter begin as a change of its weight (times the factor), at the adapter's rank."""
    if not felt_OK.any():
        # A weight of zeros lacks nothing, and an adapter of zeros would learn nothing.
        return
    a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    b_OR, a_RK = low_rank_update(felt_OK, factor_KK, len(a))
    scaling = linear.scaling["default"] ** 0.5
    a.zero_()
    a[: len(a_RK), kept_K] = (a_RK / scaling).to(a)
    b.zero_()
    b[:, : b_OR.shape[1]] = (b_OR / scaling).to(b)


def product(weight_OD: Tensor, felt_DK: Tensor) -> Tensor:
    """Product in float32, (O, K), by rows: a 16-bit head in float32 can be larger than the rest of the model."""
    product_OK = torch.empty(len(weight_OD), felt_DK.shape[1], device=weight_OD.device)
    for at in range(0, len(weight_OD), ROWS_AT_ONCE):
        torch.mm(weight_OD[at : at + ROWS_AT_ONCE].float(), felt_DK, out=product_OK[at : at + ROWS_AT_ONCE])
    return product_OK

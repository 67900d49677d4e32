"""Train the gains of the norms over the residual stream beside LoRA (`--train-norms`).

A norm's gain is a diagonal in front of the linears that read it: D numbers a norm, which LoRA of a small rank cannot
express. A rotation folds the base's gains into those linears, so the trained ones start at one there and belong to the
axes of the turned stream. Norms over the heads (Qwen3's q_norm and k_norm) stay as they are: they are no part of what
is cut, and the rank of q's and k's own adapters reaches what they would.

Shape suffixes: D hidden_size of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pat_serve.cut.axes import HIDDEN
from pat_serve.training.methods import Method
from pat_serve.training.model.slicing import placed, scatter
from pat_serve.training.ranks import snapshot


def hidden_norms(model: Any, method: Method) -> Iterator[tuple[str, str, nn.Module]]:
    """The model's norms over the hidden dimension: their names in the base and in the model, and themselves.

    Args:
        model: the PEFT model.
        method: knows the base, and what the model was cut by.
    """
    base = model.get_base_model()
    for name, spec, in_model in placed(method):
        if spec.hidden_norm:
            yield name, in_model, base.get_submodule(in_model)


def train_norms(model: Any, method: Method) -> None:
    """Let the norms' gains be trained, in float32: bfloat16 near one moves in steps of 0.004.

    After calibration and compensation, which run the model as it is, and whether or not it was cut down.
    """
    for _, _, norm in hidden_norms(model, method):
        weight: Any = norm.weight
        if weight.dtype != torch.float64:
            if weight.dtype != torch.float32:
                # First of the hooks: what comes after it meets the dtype that the norm had.
                norm.register_forward_hook(_as_its_input, prepend=True)
            weight.data = weight.data.float()
        weight.requires_grad_(True)


def trained_gains(model: Any, method: Method) -> dict[str, Tensor]:
    """The trained gains as a checkpoint of the (turned) base stores them, (D,) each; all ranks must ask.

    Where the model was cut down they mean a gain of one, which nothing looks at. Dropped layers have none.
    """
    fill = 1.0 - method.family.norm_offset
    gains = {}
    for name, _, norm in hidden_norms(model, method):
        weight: Any = norm.weight
        gain = snapshot(weight)
        if HIDDEN in method.sliced_by:
            gain = scatter(gain, method.sliced_by[HIDDEN].kept, method.base.hidden, 0, fill)
        gains[name] = gain
    return gains


def _as_its_input(_norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(inputs[0].dtype)

"""Train what will be kept: a model whose cut is decided before its first step, cut down to the K channels that stay.

With the mask closed from the start and not trained, the cut channels are zero in the whole stream and nothing that
touches them gets a gradient; so the model without them has the same losses, and a step of it costs K / D of the wide
one's. Everything that leaves a run is wide again (`wide_adapter`, the method's folds): an export starts from the wide
base, and its parity gate compares with the wide masked model, which knows nothing of this file.

The root mean square of a wide stream is taken over D numbers, of which D - K are zero: the norms' eps takes a factor
D / K and their output one of f = sqrt(D / K). The output, and not the gain as in an export: rounded to bfloat16, f
times a gain of one would be 0.13 % off in every norm alike.

Shape suffixes: D hidden_size of the base, K kept channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pat_serve.training.methods import Method

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.default\.weight")


def narrow_model(model: Any, method: Method, num_layers: int, kept_K: Tensor) -> None:
    """Cut a model that is about to be trained down to its kept channels, in place; its function stays the same.

    Args:
        model: the PEFT model with the method attached; on the meta device, too.
        method: follows with its modules, and from now on saves them wide.
        num_layers: of the base.
        kept_K: int64, ascending.
    """
    base = model.get_base_model()
    ratio = method.hidden_size / len(kept_K)
    # A tied head is the embedding: one parameter, which is cut once and stays one.
    done: set[int] = set()

    def cut(parameter: nn.Parameter, dimension: int) -> None:
        if id(parameter) not in done:
            done.add(id(parameter))
            parameter.data = parameter.data.index_select(dimension, kept_K.to(parameter.device))

    for name, spec, _ in method.family.modules(num_layers):
        module: Any = base.get_submodule(name)
        inner = getattr(module, "base_layer", module)
        for parameter in inner.parameters(recurse=False):
            # A bias runs along the weight's first axis.
            if spec.hidden_dimension is not None and spec.hidden_dimension < parameter.dim():
                cut(parameter, spec.hidden_dimension)
        for half, dimension in (("lora_A", 1), ("lora_B", 0)):
            for factor in getattr(module, half, {}).values():
                if spec.hidden_dimension == dimension:
                    cut(factor.weight, dimension)
                    _say_shape(factor)
        _say_shape(inner)
        if inner is not module:
            module.out_features, module.in_features = inner.weight.shape
        if spec.hidden_norm:
            eps = "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"
            setattr(module, eps, getattr(module, eps) * ratio)
            module.register_forward_hook(partial(_rescale, factor=math.sqrt(ratio)))
    method.narrow(kept_K)


def wide_adapter(lora: Mapping[str, Tensor], method: Method) -> dict[str, Tensor]:
    """A trained adapter's tensors in the base's own shapes, for the run's folder.

    Zeros stand where the model was cut: what the factors multiply there is zero, or is cut after them.

    Args:
        lora: whole tensors by their names in the PEFT model.
        method: says which channels they are of.
    """
    wide = dict(lora)
    if method.narrowed_to is None:
        return wide
    for name, tensor in lora.items():
        found = _FACTOR.fullmatch(name)
        assert found is not None, name
        spec, _, _ = method.family.match(f"{found['module']}.weight")
        dimension = 1 if found["half"] == "A" else 0
        if spec.hidden_dimension == dimension:
            wide[name] = scatter(tensor, method.narrowed_to, method.hidden_size, dimension)
    return wide


def scatter(tensor: Tensor, kept_K: Tensor, width: int, dimension: int, fill: float = 0.0) -> Tensor:
    """A tensor of K entries along a dimension, as one of `width` with another value in between."""
    shape = [*tensor.shape[:dimension], width, *tensor.shape[dimension + 1 :]]
    return torch.full(shape, fill, dtype=tensor.dtype).index_copy_(dimension, kept_K.cpu(), tensor.cpu())


def _say_shape(module: nn.Module) -> None:
    """Let a module's description follow its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]


def _rescale(_norm: nn.Module, _inputs: Any, output: Tensor, *, factor: float) -> Tensor:
    return output * factor

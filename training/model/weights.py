"""Train weights of the model themselves in place of LoRA (`--train head+last3` or `all`).

The adapter that peft put in is taken out again before the first step, and the weights are held in float32, which
bfloat16's autocast rounds for each product. A finished run keeps the trained weights in `run/weights/`, where a full
refit keeps its own, and has no adapter.

Biases and norms over heads stay as they are. The gains of the stream's norms are `norms.py`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pat_serve.cut.cuts import Cuts
from pat_serve.families.architectures import EMBEDDING, HEAD
from pat_serve.families.family import Family
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.training.methods import Method

LORA, HEAD_AND_LAST, ALL = "lora", "head+last3", "all"
LAST_LAYERS = 3


def trained_modules(which: str, family: Family, cuts: Cuts, base: ModelSizes, *, tied: bool) -> list[str]:
    """The base's names of the modules whose weights a run trains.

    Args:
        which: LORA, HEAD_AND_LAST or ALL.
        family: the base's.
        cuts: that the model was cut by.
        base: sizes of the base.
        tied: the model's head is its embedding, which is then trained as both.
    """
    if which == LORA:
        return []
    layers = cuts.layers_kept(base.layers)
    if which == HEAD_AND_LAST:
        layers = layers[-LAST_LAYERS:]
    names = []
    for name, spec, layer in family.modules(base.layers):
        if len(spec.dims) != 2:
            continue
        if layer is not None:
            trains = layer in layers
        elif name == HEAD:
            trains = not tied
        else:
            trains = which == ALL or (tied and name == EMBEDDING)
        if trains:
            names.append(name)
    return names


def train_weights(model: Any, method: Method, which: str) -> list[str]:
    """Take the adapter out and let weights be trained, in float32; once the model is as it will be trained.

    Args:
        model: the PEFT model; its wrapper stays.
        method: knows the base, and what the model was cut by.
        which: HEAD_AND_LAST or ALL.

    Returns:
        the base's names of their modules.
    """
    base = model.get_base_model()
    _take_adapters_out(base)
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    names = trained_modules(which, method.family, method.sliced_by, method.base, tied=tied)
    numbers = {layer: number for number, layer in enumerate(method.sliced_by.layers_kept(method.base.layers))}
    for name, spec, layer in method.family.modules(method.base.layers):
        if name not in names:
            continue
        module = base.get_submodule(name if layer is None else spec.module.format(i=numbers[layer]))
        weight: Any = module.weight
        if weight.dtype != torch.float64:
            if isinstance(module, nn.Embedding) and weight.dtype != torch.float32:
                # First of the hooks: the stream begins in the dtype that it had.
                module.register_forward_hook(_Cast(weight.dtype), prepend=True)
            weight.data = weight.data.float()
        weight.requires_grad_(True)
    return names


def _take_adapters_out(base: nn.Module) -> None:
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, own = name.rpartition(".")
            setattr(base.get_submodule(parent), own, module.get_base_layer())


class _Cast:
    """A forward hook that gives an output in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.to(self.dtype)

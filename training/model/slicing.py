"""Train what will be kept: a model whose cuts are decided before its first step, cut down to what stays.

Nothing looks at a closed channel of the stream, at an FFN channel or a head whose column is zero, or at a layer that is
left out, and nothing that touches them gets a gradient. So the model without them has the same losses, and its step
costs what a step of the smaller model costs. Everything that leaves a run has the base's shapes and layer numbers
again (`wide_adapter`, the method's folds): an export starts from the base, and its parity gate compares with the masked
model in the base's shapes, which knows nothing of this file.

The hidden axis alone has consequences elsewhere. The root mean square of a wide stream is taken over D numbers, of
which D - K are zero: the norms' eps takes a factor D / K and their output one of f = sqrt(D / K). The output takes it
here, and the gain in an export. Rounded to bfloat16, f times a gain of one would be 0.13 % off in every norm alike.

Shape suffixes: D hidden_size of the base, K kept channels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pat_serve.cut.axes import AXES, HIDDEN
from pat_serve.cut.cuts import Cuts
from pat_serve.cut.slicing import Target, targets
from pat_serve.families.family import TensorSpec

if TYPE_CHECKING:
    from pat_serve.training.methods import Method

_HALVES = (("lora_A", 1), ("lora_B", 0))


def slice_model(model: Any, method: Method, cuts: Cuts) -> None:
    """Cut a model that is about to be trained down to what stays, in place; its function stays the same.

    Args:
        model: the PEFT model with the method attached; on the meta device, too.
        method: follows with its modules, and from now on saves them in the base's shapes.
        cuts: what stays.
    """
    base = model.get_base_model()
    # A tied head is the embedding: one parameter, which is cut once and stays one.
    done: set[int] = set()

    def cut(parameter: nn.Parameter, kept: Tensor | None, dimension: int) -> None:
        if kept is not None and id(parameter) not in done:
            parameter.data = parameter.data.index_select(dimension, kept.to(parameter.device))

    for name, _, target in _targets(method, cuts):
        if target is None:
            continue
        module: Any = base.get_submodule(name)
        inner = getattr(module, "base_layer", module)
        for parameter in inner.parameters(recurse=False):
            # A bias runs along the weight's first dimension.
            for dimension, kept in enumerate(target.kept[: parameter.dim()]):
                cut(parameter, kept, dimension)
            done.add(id(parameter))
        for half, dimension in _HALVES:
            for factor in getattr(module, half, {}).values():
                cut(factor.weight, target.kept[dimension], dimension)
                _say_shape(factor)
        _say_shape(inner)
        if inner is not module:
            module.out_features, module.in_features = inner.weight.shape
        if target.spec.hidden_norm and HIDDEN in cuts:
            _keep_mean_square(module, len(cuts[HIDDEN].kept) / method.base.hidden)
    _drop_layers(base.model, cuts.layers_kept(method.base.layers))
    _tell_sizes(base.model, method, cuts)
    method.follow(cuts)


def _targets(method: Method, cuts: Cuts) -> Iterator[tuple[str, TensorSpec, Target | None]]:
    """Every module of the base with what becomes of its weight; None in a layer that is dropped."""
    modules = {f"{name}.weight": (name, spec) for name, spec, _ in method.family.modules(method.base.layers)}
    for weight, target in targets(method.family, cuts, method.base, modules).items():
        name, spec = modules[weight]
        yield name, spec, target


def _keep_mean_square(norm: Any, share: float) -> None:
    eps = "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"
    setattr(norm, eps, getattr(norm, eps) / share)
    norm.register_forward_hook(partial(_rescale, factor=math.sqrt(1 / share)))


def _drop_layers(decoder: Any, kept: list[int]) -> None:
    if len(kept) == len(decoder.layers):
        return
    decoder.layers = nn.ModuleList([decoder.layers[i] for i in kept])
    for number, layer in enumerate(decoder.layers):
        # A cache, which no training has, would file keys and values under this number.
        layer.self_attn.layer_idx = number


def _tell_sizes(decoder: Any, method: Method, cuts: Cuts) -> None:
    """Let the decoder and its attentions count heads and layers as they now are.

    The model's own config stays the base's, which an adapter's folder and a notebook read.
    """
    config = copy.copy(decoder.config)
    for name, axis in AXES.items():
        if name == HIDDEN:
            continue
        for setting, value in axis.settings(method.base, axis.length(cuts.sizes(method.base))).items():
            _set(config, setting, value)
        for entries in axis.sliced:
            if getattr(config, entries, None) is not None and name in cuts:
                _set(config, entries, [getattr(config, entries)[i] for i in cuts[name].kept.tolist()])
    decoder.config = config
    for layer in decoder.layers:
        layer.self_attn.config = config
        if hasattr(layer.self_attn, "num_key_value_heads"):
            layer.self_attn.num_key_value_heads = config.num_key_value_heads


def _set(config: Any, setting: str, value: Any) -> None:
    # Past the class' checks: what is trained is no model that is ever saved.
    config.__dict__[setting] = value


def placed(method: Method) -> Iterator[tuple[str, TensorSpec, str]]:
    """Every module of the base that the model still has: its name there, its line in the table, its name in the model.

    Args:
        method: says what the model was cut by.
    """
    for name, spec, target in _targets(method, method.sliced_by):
        if target is not None:
            yield name, spec, target.name.removesuffix(".weight")


def wide_adapter(lora: Mapping[str, Tensor], method: Method) -> dict[str, Tensor]:
    """A trained adapter's tensors in the base's own shapes and under its layers' numbers, for the run's folder.

    Zeros stand where the model was cut, also for the linears of dropped layers: what the factors multiply there is
    zero, or is cut after them.

    Args:
        lora: whole tensors by their names in the PEFT model.
        method: says what the model was cut by.
    """
    if method.sliced_by.is_identity:
        return dict(lora)
    wide: dict[str, Tensor] = {}
    ranks = {name.partition(".lora_A.")[0].rpartition(".")[2]: len(a) for name, a in lora.items() if ".lora_A." in name}
    left = dict(lora)
    for name, spec, target in _targets(method, method.sliced_by):
        for half, dimension in _HALVES:
            wide_name = f"base_model.model.{name}.{half}.default.weight"
            length = spec.shape("weight", method.base)[dimension] if len(spec.dims) == 2 else 0
            if target is None:
                rank = ranks.get(name.rpartition(".")[2])
                if rank is not None:
                    wide[wide_name] = torch.zeros((rank, length) if dimension else (length, rank))
                continue
            tensor = left.pop(f"base_model.model.{target.name.removesuffix('.weight')}.{half}.default.weight", None)
            if tensor is not None:
                kept = target.kept[dimension]
                wide[wide_name] = tensor if kept is None else scatter(tensor, kept, length, dimension)
    assert not left, left.keys()
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

"""The trained model as training saw it: the wide base with its adapter, every HSM applied, what is cut at zero.

This is the reference that an export is held against. It shares nothing with the export's rewriting: the weights stay as
they are, operators and masks run as hooks, and a layer that is dropped stays in its place and hands its input on.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pat_serve.checkpoints.stock_class import meta_model
from pat_serve.cut.axes import FFN, HIDDEN, KV_GROUPS
from pat_serve.cut.cuts import AxisCut
from pat_serve.cut.hybrid import HybridFold, apply_hybrid
from pat_serve.cut.rotation import rotate_model, untie_head
from pat_serve.export.parity.layerwise import (
    LayerwiseModel,
    ReplacedWeights,
    RotatedWeights,
    StoredWeights,
    TrainedGains,
    Weights,
)
from pat_serve.export.run.reader import Run
from pat_serve.families.architectures import HEAD
from pat_serve.run.folder import ADAPTER_FOLDER

_HEAD_WEIGHT = f"{HEAD}.weight"
# The linear whose input is what an axis of the layer has, in every family.
_READERS = {FFN: "mlp.down_proj", KV_GROUPS: "self_attn.o_proj"}


def load_masked_model(run: Run, dtype: torch.dtype) -> nn.Module:
    """Load the wide model of a finished run.

    Args:
        run: the training run.
        dtype: of the weights and the computation.

    Returns:
        a causal language model in eval mode whose logits the exported model must reproduce.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plan, base = run.plan, run.base
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype, local_files_only=True)
    if plan.rotation is not None:
        rotate_model(model, base.family, base.num_layers, plan.rotation, keeps_tie=plan.tied)
    _replace_weights(model, run)
    modules = dict(model.named_modules())
    for name, gain in plan.norms.items():
        modules[name].weight = nn.Parameter(gain.to(dtype), requires_grad=False)
    if plan.adapter:
        model = PeftModel.from_pretrained(model, run.folder / ADAPTER_FOLDER, autocast_adapter_dtype=False)
        modules = dict(model.get_base_model().named_modules())
    apply_plan(modules, run, dtype)
    for i in dropped_layers(run):
        # A dropped layer still runs: a cache takes the length of the text from the first layer's keys.
        modules[f"model.layers.{i}"].register_forward_hook(_hand_on, with_kwargs=True)
    convert_parameters(model, dtype)
    model.eval()
    assert isinstance(model, nn.Module)
    return model


def convert_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model another dtype, in place.

    Unlike model.to(dtype) it leaves buffers, such as the rotary frequencies, their precision whatever the weights have.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def open_masked_layerwise(run: Run, dtype: torch.dtype) -> LayerwiseModel:
    """The same model for one that does not fit into memory; arguments as for `load_masked_model`."""
    from peft import PeftModel, load_peft_weights
    from transformers import AutoConfig

    plan, base = run.plan, run.base
    model = meta_model(AutoConfig.from_pretrained(base.folder, local_files_only=True))
    weights: Weights = StoredWeights(base)
    if plan.rotation is not None:
        weights = RotatedWeights(weights, base.family, plan.rotation, tied=plan.tied)
    parts = (plan.rotation is not None and not plan.tied) or _HEAD_WEIGHT in run.replaced
    if parts:
        untie_head(model)
    if run.replaced:
        weights = ReplacedWeights(weights, run.replaced, tied=base.tied and not parts)
    if plan.norms:
        weights = TrainedGains(weights, {f"{name}.weight": gain for name, gain in plan.norms.items()})
    layerwise = LayerwiseModel(model, weights, dtype, skipped=dropped_layers(run))
    modules = dict(model.named_modules())
    if plan.adapter:
        folder = str(run.folder / ADAPTER_FOLDER)
        wrapped = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False, low_cpu_mem_usage=True).eval()
        # peft puts an adapter where its linear's weight lies, and that is nowhere yet: the tensors are given by name.
        stored = load_peft_weights(folder, device="cpu").items()
        adapter = {f"{name.removesuffix('.weight')}.default.weight": tensor.to(dtype) for name, tensor in stored}
        unexpected = wrapped.load_state_dict(adapter, strict=False, assign=True).unexpected_keys
        assert not unexpected, unexpected
        modules = dict(wrapped.get_base_model().named_modules())
    apply_plan(modules, run, dtype)
    return layerwise


def dropped_layers(run: Run) -> list[int]:
    """The layers that do not stay."""
    return sorted(set(range(run.base.num_layers)) - set(run.plan.cuts.layers_kept(run.base.num_layers)))


def apply_plan(modules: dict[str, nn.Module], run: Run, dtype: torch.dtype) -> None:
    """Hook the plan's operators and masks to the modules that they follow or precede; layers are left alone.

    Args:
        modules: the model's modules by dotted name, without any wrapper's prefix.
        run: its plan gives the operators and what is kept.
        dtype: of the model. Operators and masks keep float32 at least: rounded to bfloat16, a scale near 1 would move
            in steps of 0.004, and that is no rounding that an export has.
    """
    plan, base = run.plan, run.base
    dtype = torch.promote_types(dtype, torch.float32)
    hidden = plan.cuts.get(HIDDEN)
    gate_D = torch.ones(base.hidden_size, dtype=dtype) if hidden is None else _mask(hidden, dtype)
    for site in base.family.residual_writers(base.num_layers):
        if site in plan.folds:
            fold = plan.folds[site].to(dtype)
            modules[site].register_forward_hook(partial(_fold_output, fold=fold, gate_D=gate_D))
        elif hidden is not None:
            modules[site].register_forward_hook(partial(_mask_output, gate_D=gate_D))
    for axis, reader in _READERS.items():
        for i in range(base.num_layers):
            if cut := plan.cuts.get(f"{axis}.{i}"):
                module: Any = modules[f"model.layers.{i}.{reader}"]
                # A group has the outputs of all of its query heads.
                mask_I = _mask(cut, dtype).repeat_interleave(module.in_features // cut.width)
                module.register_forward_pre_hook(partial(_mask_input, mask_I=mask_I))


def _replace_weights(model: Any, run: Run) -> None:
    if _HEAD_WEIGHT in run.replaced:
        untie_head(model)
    parameters = dict(model.named_parameters())
    for name, entry in run.replaced.items():
        parameters[name].data.copy_(entry.read())


def _mask(cut: AxisCut, dtype: torch.dtype) -> Tensor:
    """One where an index stays, else zero."""
    return torch.zeros(cut.width, dtype=dtype).index_fill_(0, cut.kept, 1.0)


def _fold_output(_module: nn.Module, _inputs: Any, output: Tensor, *, fold: HybridFold, gate_D: Tensor) -> Tensor:
    return apply_hybrid(output, fold, gate_D)


def _mask_output(_module: nn.Module, _inputs: Any, output: Tensor, *, gate_D: Tensor) -> Tensor:
    return output * gate_D.to(output.dtype)


def _mask_input(_module: nn.Module, inputs: tuple[Tensor, ...], *, mask_I: Tensor) -> tuple[Tensor, ...]:
    return (inputs[0] * mask_I.to(inputs[0].dtype), *inputs[1:])


def _hand_on(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Tensor) -> Tensor:
    """Give the layer's input in place of its output."""
    assert isinstance(output, Tensor)
    given = inputs[0] if inputs else named["hidden_states"]
    assert isinstance(given, Tensor)
    return given


def round_normalizer(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a scaled embedding (Gemma) the factor sqrt(hidden_size) that it has when the model runs in another dtype."""
    for module in model.modules():
        scale = getattr(module, "embed_scale", None)
        if isinstance(scale, Tensor):
            module.embed_scale = scale.to(dtype).to(scale.dtype)

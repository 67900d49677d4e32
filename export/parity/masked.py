"""The trained model as training saw it: the wide base with its adapter, every HSM applied, cut channels at zero.

This is the reference that an export is held against. It shares nothing with the export's rewriting: the weights stay as
they are and the operators run as forward hooks.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pat_serve.axes import HIDDEN
from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.checkpoints.recognize import family_of
from pat_serve.checkpoints.stock_class import meta_model
from pat_serve.export.parity.layerwise import LayerwiseModel, ReplacedWeights, RotatedWeights, StoredWeights, Weights
from pat_serve.hybrid import HybridFold, apply_hybrid
from pat_serve.plan import PruningPlan
from pat_serve.rotation import rotate_model, untie_head
from pat_serve.run_folder import ADAPTER_FOLDER


def load_masked_model(base_folder: Path, run: Path, plan: PruningPlan, dtype: torch.dtype) -> nn.Module:
    """Load the wide model of a finished run.

    Args:
        base_folder: the base checkpoint.
        run: the training run, with its adapter.
        plan: the run's plan.
        dtype: of the weights and the computation.

    Returns:
        a causal language model in eval mode whose logits the exported model must reproduce.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype, local_files_only=True)
    if plan.rotation is not None:
        rotate_model(
            model, family_of(model.config.to_dict(), base_folder), model.config.num_hidden_layers, plan.rotation
        )
    modules = dict(model.named_modules())
    for name, gain in plan.norms.items():
        modules[name].weight = nn.Parameter(gain.to(dtype), requires_grad=False)
    if plan.adapter:
        model = PeftModel.from_pretrained(model, run / ADAPTER_FOLDER, autocast_adapter_dtype=False)
        modules = dict(model.get_base_model().named_modules())
    apply_plan(modules, plan, dtype)
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


def open_masked_layerwise(base: Checkpoint, run: Path, plan: PruningPlan, dtype: torch.dtype) -> LayerwiseModel:
    """The same model for one that does not fit into memory; arguments as for `load_masked_model`."""
    from peft import PeftModel, load_peft_weights
    from transformers import AutoConfig

    model = meta_model(AutoConfig.from_pretrained(base.folder, local_files_only=True))
    weights: Weights = StoredWeights(base)
    if plan.rotation is not None:
        weights = RotatedWeights(weights, base.family, plan.rotation)
        untie_head(model)
    if plan.norms:
        weights = ReplacedWeights(weights, {f"{name}.weight": gain for name, gain in plan.norms.items()})
    layerwise = LayerwiseModel(model, weights, dtype)
    modules = dict(model.named_modules())
    if plan.adapter:
        folder = str(run / ADAPTER_FOLDER)
        wrapped = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False, low_cpu_mem_usage=True).eval()
        # peft puts an adapter where its linear's weight lies, and that is nowhere yet: the tensors are given by name.
        stored = load_peft_weights(folder, device="cpu").items()
        adapter = {f"{name.removesuffix('.weight')}.default.weight": tensor.to(dtype) for name, tensor in stored}
        unexpected = wrapped.load_state_dict(adapter, strict=False, assign=True).unexpected_keys
        assert not unexpected, unexpected
        modules = dict(wrapped.get_base_model().named_modules())
    apply_plan(modules, plan, dtype)
    return layerwise


def apply_plan(modules: dict[str, nn.Module], plan: PruningPlan, dtype: torch.dtype) -> None:
    """Hook the plan's operators to the outputs of the modules that they follow.

    Args:
        modules: the model's modules by dotted name, without any wrapper's prefix.
        plan: gives the operators and the kept channels of the hidden axis.
        dtype: of the model. The operators keep float32 at least: rounded to bfloat16, a scale near 1 would move in
            steps of 0.004, and that is no rounding that an export has.
    """
    cut = plan.cuts[HIDDEN]
    dtype = torch.promote_types(dtype, torch.float32)
    gate_D = torch.zeros(cut.width, dtype=dtype).index_fill_(0, cut.kept, 1.0)
    for site, fold in plan.folds.items():
        modules[site].register_forward_hook(partial(_hook, fold=fold.to(dtype), gate_D=gate_D))


def _hook(_module: nn.Module, _inputs: Any, output: Tensor, *, fold: HybridFold, gate_D: Tensor) -> Tensor:
    return apply_hybrid(output, fold, gate_D)


def round_normalizer(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a scaled embedding (Gemma) the factor sqrt(hidden_size) that it has when the model runs in another dtype."""
    for module in model.modules():
        scale = getattr(module, "embed_scale", None)
        if isinstance(scale, Tensor):
            module.embed_scale = scale.to(dtype).to(scale.dtype)

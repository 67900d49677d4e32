"""Load a base; adapt its linears with LoRA and attach the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from pat_serve.checkpoints.checkpoint import Checkpoint
from pat_serve.cut.rotation import effective_gain, rotate_model
from pat_serve.errors import MissingExtra
from pat_serve.families.architectures import FINAL_NORM, HEAD
from pat_serve.families.family import Family
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.training.config import TrainRecipe
from pat_serve.training.methods import Method, method_of
from pat_serve.training.model.calibration import Calibration
from pat_serve.training.model.weights import LORA
from pat_serve.training.ranks import sharded_by_fsdp


def load_base(checkpoint: Checkpoint, recipe: TrainRecipe, dtype: torch.dtype) -> Any:
    """Load the base, on the accelerator if it fits there.

    Args:
        checkpoint: the base.
        recipe: the run's settings; its seed must have been set before.
        dtype: of the frozen base weights; what is trained is float32.
    """
    from transformers import AutoModelForCausalLM

    quantized = {"quantization_config": _nf4(dtype)} if recipe.quantize_base else {}
    base = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype, local_files_only=True, **quantized)
    _move_to_accelerator(base)
    return base


def _move_to_accelerator(base: Any) -> None:
    """Calibrating and rotating billions of weights on a CPU takes many minutes; the Trainer moves the model anyway."""
    if not torch.cuda.is_available() or sharded_by_fsdp() or base.device.type == "cuda":
        return
    device = PartialState().device
    free_bytes, _ = torch.cuda.mem_get_info(device)
    if base.get_memory_footprint() * 1.2 < free_bytes:
        base.to(device)


def adapt(
    base: Any,
    family: Family,
    recipe: TrainRecipe,
    shape: Mapping[str, int],
    total_steps: int,
    calibration: Calibration | None = None,
) -> tuple[nn.Module, Method]:
    """Put LoRA and the method's modules into a base model and freeze the rest.

    Args:
        base: a causal language model of transformers.
        family: its architecture.
        recipe: the run's settings.
        shape: counts to end with, by axis.
        total_steps: optimizer steps of the whole run.
        calibration: of the base, for a method that wants one; its rotation is applied here.

    Returns:
        the PEFT model, or the base itself for a method without an adapter, and the method.
    """
    from peft import LoraConfig, get_peft_model

    base.config.use_cache = False
    dense_gain_D = None
    if calibration is not None and calibration.rotation_DD is not None:
        last_norm, last_gain_D = base.get_submodule(FINAL_NORM), calibration.last_gain_D
        keeps_tie = last_gain_D is not None
        rotate_model(base, family, base.config.num_hidden_layers, calibration.rotation_DD, keeps_tie=keeps_tie)
        if last_gain_D is not None:
            dense_gain_D = effective_gain(last_norm.weight.detach().double(), family)
            last_norm.weight.data.copy_(last_gain_D)
    if not method_of(recipe).adapts:
        base.requires_grad_(False)
        return base, _attached(base, base, family, recipe, shape, total_steps)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        # Where weights are trained in its place, the adapter is taken out again before the first step.
        r=recipe.lora_rank if recipe.train == LORA else 1,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=family.lora_targets() + ([HEAD] if recipe.lora_head else []),
    )
    model = get_peft_model(base, lora)
    method = _attached(model, model.get_base_model(), family, recipe, shape, total_steps, calibration, dense_gain_D)
    assert isinstance(model, nn.Module)
    return model, method


def _attached(
    model: Any,
    base: Any,
    family: Family,
    recipe: TrainRecipe,
    shape: Mapping[str, int],
    total_steps: int,
    calibration: Calibration | None = None,
    dense_gain_D: Tensor | None = None,
) -> Method:
    """The method with its modules in the model; `base` is the model inside peft's wrapper."""
    sizes = ModelSizes.of(base.config.to_dict(), family)
    method = method_of(recipe)(recipe, family, sizes, sizes.with_counts(shape), total_steps)
    method.calibration, method.dense_gain_D = calibration, dense_gain_D
    method.attach(base, sizes.layers)
    # The base is on its device already, and the Trainer would move what is new only after it has been called, or, with
    # a quantized base, never.
    for module in method.modules().values():
        module.to(base.device)
    if recipe.gradient_checkpointing and not method.follows_writers:
        # The embedding's output needs a gradient for the recomputation to reach the adapters; an HSM gives it one.
        model.enable_input_require_grads()
    return method


def _nf4(dtype: torch.dtype) -> Any:
    """QLoRA's settings (arXiv 2305.14314): 4-bit NormalFloat, scales quantized too.

    Stored as `dtype`, which lets FSDP shard the packed weights.
    """
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise MissingExtra(
            "--quantize-base nf4",
            expected="bitsandbytes",
            found="no such package",
            fix="pip install bitsandbytes, or leave the flag out.",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )

"""Schemes of the compressed-tensors format, as data and pure maths.

A scheme quantises every linear of the decoder layers; embedding, head, norms and biases stay floats. In 8 bits each
output channel has a scale of its own, and activations are quantised token by token while the model runs, so nothing is
calibrated (docs/formats.md has what calibration would gain). In 4 bits a group of inputs has a scale, activations stay
floats, and GPTQ rounds the weights for the inputs of a calibration (`gptq.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pat_serve.errors import UsageError
from pat_serve.families.architectures import HEAD

SCALE_SUFFIX, PACKED_SUFFIX, SHAPE_SUFFIX = "_scale", "_packed", "_shape"

# The gate's limits for 8 bits catch damage and no more: SmolLM2-135M-Instruct and its cut model, whose activations have
# large outliers, cost 0.05 to 0.09 nats in int8 and fp8 at an unchanged perplexity (docs/formats.md).
EIGHT_BITS_PERPLEXITY, EIGHT_BITS_KL_NATS = 1.05, 0.15


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to write a linear's weight in few bits.

    Attributes:
        name: name for `--quantize`.
        bits: of a weight.
        label: of weights and activations, for the model card.
        dtype: dtype of the stored weight; several weights of 4 bits lie in one number.
        largest: the largest magnitude that is stored.
        kind: compressed-tensors' name of the number type.
        format: compressed-tensors' name of the layout.
        perplexity_limit: an export whose perplexity grows by more than this factor is refused.
        kl_limit_nats: limit of the mean KL(float || quantised).
        runs_on: devices, for the model card.
        group_size: inputs that share a scale; None for a scale of each output channel.
    """

    name: str
    bits: int
    label: str
    dtype: torch.dtype
    largest: float
    kind: str
    format: str
    perplexity_limit: float
    kl_limit_nats: float
    runs_on: str
    group_size: int | None = None

    @property
    def calibrated(self) -> bool:
        """Weights are rounded for the inputs of a calibration."""
        return self.group_size is not None

    def parts(self, shape: tuple[int, ...], float_dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor in the place of a linear's weight, by what is appended to the weight's name.

        Args:
            shape: of the weight, (out, in).
            float_dtype: of what is not quantised.
        """
        rows, inputs = shape
        if self.group_size is None:
            return {"": (self.dtype, shape), SCALE_SUFFIX: (torch.float32, (rows, 1))}
        return {
            PACKED_SUFFIX: (self.dtype, (rows, inputs * self.bits // (8 * self.dtype.itemsize))),
            SCALE_SUFFIX: (float_dtype, (rows, inputs // self.group_size)),
            SHAPE_SUFFIX: (torch.int64, (2,)),
        }

    def in_groups(self, group_size: int) -> Scheme:
        """The same scheme with groups of another size."""
        return replace(self, group_size=group_size)


# 64 and not 127: on CPUs without VNNI, vLLM's int8 kernel (oneDNN) adds two products of a weight and an activation, the
# latter shifted to 0..255, in 16 bits that saturate; 2 * 255 * 64 is the most that fits. The bit that this gives up
# costs 1e-4 nats; saturation costs a hundred times that (docs/formats.md).
INT8 = Scheme(
    name="int8",
    bits=8,
    label="W8A8",
    dtype=torch.int8,
    largest=64.0,
    kind="int",
    format="int-quantized",
    perplexity_limit=EIGHT_BITS_PERPLEXITY,
    kl_limit_nats=EIGHT_BITS_KL_NATS,
    runs_on="vLLM on CPUs and on NVIDIA GPUs from Turing on",
)
FP8 = Scheme(
    name="fp8",
    bits=8,
    label="W8A8",
    dtype=torch.float8_e4m3fn,
    largest=448.0,
    kind="float",
    format="float-quantized",
    perplexity_limit=EIGHT_BITS_PERPLEXITY,
    kl_limit_nats=EIGHT_BITS_KL_NATS,
    runs_on="vLLM on CPUs and on NVIDIA GPUs (fp8 arithmetic from Ada and Hopper on, weights alone on Ampere)",
)
# The limits catch damage and no more: four bits cost a small model several per cent, and --require-quality says whether
# that is too much.
INT4 = Scheme(
    name="int4",
    bits=4,
    label="W4A16",
    dtype=torch.int32,
    largest=8.0,
    kind="int",
    format="pack-quantized",
    perplexity_limit=1.3,
    kl_limit_nats=0.26,
    runs_on="vLLM on CPUs, where linears are multiples of 32, and on NVIDIA GPUs from Turing on",
    group_size=128,
)
SCHEMES = {scheme.name: scheme for scheme in (INT8, INT4, FP8)}


def scheme_named(name: str) -> Scheme:
    """Find the scheme that the user asked for.

    Raises:
        UsageError: no scheme has that name.
    """
    if name not in SCHEMES:
        raise UsageError("--quantize", expected=", ".join(SCHEMES), found=name, fix="Choose one of them.")
    return SCHEMES[name]


def quantize_channels(weight_OI: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Round a weight to 8 bits with one scale for each output channel.

    Args:
        weight_OI: float32, (out, in).
        scheme: the scheme.

    Returns:
        the stored weight (out, in) in the scheme's dtype and its scales (out, 1) in float32: weight ~ stored * scale. A
        channel of zeros has the scale 1.
    """
    assert weight_OI.dtype == torch.float32
    scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / scheme.largest
    # A channel whose largest weight is below float32's smallest normal number times 127 would divide by zero too.
    scale_O1 = torch.where(scale_O1 < torch.finfo(torch.float32).tiny, torch.ones_like(scale_O1), scale_O1)
    scaled_OI = (weight_OI / scale_O1).clamp(-scheme.largest, scheme.largest)
    stored_OI = scaled_OI.round().to(torch.int8) if scheme.dtype == torch.int8 else scaled_OI.to(scheme.dtype)
    return stored_OI, scale_O1


def dequantize_channels(stored_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """Compute the weight that a loader sees, in float32."""
    return stored_OI.to(torch.float32) * scale_O1


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """Make `quantization_config` for config.json, as compressed-tensors, transformers and vLLM read it."""
    numbers: dict[str, Any] = {"num_bits": scheme.bits, "type": scheme.kind, "symmetric": True}
    if scheme.group_size is None:
        stored = {
            "weights": numbers | {"strategy": "channel", "dynamic": False},
            "input_activations": numbers | {"strategy": "token", "dynamic": True},
        }
    else:
        stored = {"weights": numbers | {"strategy": "group", "group_size": scheme.group_size, "dynamic": False}}
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **stored}},
        "ignore": [HEAD],
    }

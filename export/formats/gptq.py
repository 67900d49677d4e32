"""Four-bit weights in groups, as pure maths: scales, GPTQ (arXiv 2210.17323), and how compressed-tensors packs codes.

GPTQ rounds a weight one input at a time. After each it moves the inputs that are still to come, so that they make up
for its error as far as the second moments of the inputs allow: the output's error is e H e^T for each row e of W - W'.
Inputs with the most energy go first, while all others can still make up for them. Every group's scale is fixed before
the first rounding, so the order leaves no trace in the file.

Shape suffixes: O outputs, I inputs, G groups of inputs, C inputs of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST, HIGHEST = -8, 7
_PACKED = 8  # codes in an int32
_DAMPING = 0.01
# Updates reach the later blocks at once, as one product: inputs of a block alone are updated one by one.
_BLOCK = 128
# A group's range may be cut: a few clipped weights cost less than a coarser step for all others.
_SHRINKS = tuple(1 - step / 40 for step in range(19))
_SCALES_AT_ONCE = 1 << 22


def group_scales(weight_OI: Tensor, energy_I: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """The scale of each group that costs least by nearest rounding, weighed by the inputs' energies.

    Args:
        weight_OI: float32, (out, in).
        energy_I: mean squares of the inputs.
        group_size: inputs that share a scale; divides their number.
        dtype: in which the scales are stored. They are rounded to it here, so that a loader sees what was tried.

    Returns:
        (out, in / group_size) in `dtype`, all positive. A group of zeros has the scale 1.
    """
    weight_OGI = weight_OI.reshape(len(weight_OI), -1, group_size)
    energy_GI = energy_I.to(weight_OI.dtype).reshape(-1, group_size)
    rows = max(1, _SCALES_AT_ONCE // weight_OI.shape[1])
    return torch.cat([_best_scales(block_OGI, energy_GI, dtype) for block_OGI in torch.split(weight_OGI, rows)])


def _best_scales(weight_OGI: Tensor, energy_GI: Tensor, dtype: torch.dtype) -> Tensor:
    widest_OG = weight_OGI.abs().amax(-1) / HIGHEST
    least = torch.finfo(dtype).tiny
    best_OG, cost_OG = torch.ones_like(widest_OG), torch.full_like(widest_OG, torch.inf)
    for shrink in _SHRINKS:
        scale_OG = (widest_OG * shrink).to(dtype).to(torch.float32)
        scale_OG = torch.where(scale_OG < least, torch.ones_like(scale_OG), scale_OG)
        rounded_OGI = _nearest(weight_OGI, scale_OG[..., None]) * scale_OG[..., None]
        found_OG = ((rounded_OGI - weight_OGI).square() * energy_GI).sum(-1)
        better_OG = found_OG < cost_OG
        best_OG = torch.where(better_OG, scale_OG, best_OG)
        cost_OG = torch.where(better_OG, found_OG, cost_OG)
    return best_OG.to(dtype)


def round_groups(weight_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """Round each weight to the nearest code of its group's scale: int8 in [-8, 7], (out, in)."""
    return _nearest(weight_OI, _spread(scale_OG, weight_OI.shape[1])).to(torch.int8)


def gptq(weight_OI: Tensor, second_II: Tensor, scale_OG: Tensor) -> Tensor:
    """Round a weight so that its outputs change least.

    Args:
        weight_OI: float32, (out, in).
        second_II: second moments of the inputs, (in, in).
        scale_OG: positive scales of the groups.

    Returns:
        codes: int8 in [-8, 7], (out, in); the weight is about codes * scale.
    """
    inputs = weight_OI.shape[1]
    order_I = second_II.diagonal().argsort(descending=True, stable=True)
    factor_II = _inverse_factor(second_II[order_I][:, order_I])
    left_OI = weight_OI[:, order_I].to(torch.float32)  # a copy
    scale_OI = _spread(scale_OG, inputs)[:, order_I]
    codes_OI = torch.empty_like(left_OI)
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        block_OC, errors_OC = left_OI[:, start:stop], torch.empty_like(left_OI[:, start:stop])
        factor_CC = factor_II[start:stop, start:stop]
        for at in range(stop - start):
            scale_O = scale_OI[:, start + at]
            code_O = _nearest(block_OC[:, at], scale_O)
            codes_OI[:, start + at] = code_O
            error_O = (block_OC[:, at] - code_O * scale_O) / factor_CC[at, at]
            block_OC[:, at:] -= error_O[:, None] * factor_CC[at, at:]
            errors_OC[:, at] = error_O
        left_OI[:, stop:] -= errors_OC @ factor_II[start:stop, stop:]
    unordered_OI = torch.empty_like(codes_OI)
    unordered_OI[:, order_I] = codes_OI
    return unordered_OI.to(torch.int8)


def _inverse_factor(second_II: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped moments' inverse, in float32; computed in float64."""
    damped_II = second_II.to(torch.float64, copy=True)
    energy = float(damped_II.diagonal().mean())
    # An input that was never seen has no moment at all: it is rounded to the nearest, and the others do not feel it.
    damped_II.diagonal().add_(_DAMPING * energy if energy > 0 else 1.0)
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
    factor_II: Tensor = torch.linalg.cholesky(inverse_II, upper=True)
    return factor_II.to(torch.float32)


def felt_error(weight_OI: Tensor, other_OI: Tensor, second_II: Tensor) -> float:
    """Mean square of the change of the outputs, summed over them, for inputs of these second moments."""
    off_OI = (weight_OI - other_OI).to(torch.float64)
    return float((off_OI @ second_II.to(torch.float64) * off_OI).sum())


def dequantize_groups(codes_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """Compute the weight that a loader sees, in float32."""
    return codes_OI.to(torch.float32) * _spread(scale_OG, codes_OI.shape[1])


def pack_codes(codes_OI: Tensor) -> Tensor:
    """Put eight codes of a row into an int32, shifted to 0..15, the first in the lowest bits: (out, in / 8)."""
    nibbles_OIP = (codes_OI.to(torch.int32) - LOWEST).reshape(len(codes_OI), -1, _PACKED)
    return (nibbles_OIP << _shifts()).sum(-1, dtype=torch.int32)


def unpack_codes(packed_OP: Tensor) -> Tensor:
    """Take the codes of `pack_codes` out again: int8, (out, in)."""
    nibbles_OPI: Tensor = (packed_OP[..., None] >> _shifts()) & 15
    return (nibbles_OPI.flatten(1) + LOWEST).to(torch.int8)


def _shifts() -> Tensor:
    return 4 * torch.arange(_PACKED, dtype=torch.int32)


def _nearest(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(LOWEST, HIGHEST)


def _spread(scale_OG: Tensor, inputs: int) -> Tensor:
    return scale_OG.to(torch.float32).repeat_interleave(inputs // scale_OG.shape[1], dim=1)

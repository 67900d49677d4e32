"""GPTQ against every choice of codes, against nearest rounding, and against compressed-tensors' own packing."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pat_serve.export.formats.gptq import (
    HIGHEST,
    LOWEST,
    dequantize_groups,
    felt_error,
    gptq,
    group_scales,
    pack_codes,
    round_groups,
    unpack_codes,
)


def drawn(seed: int, rows: int, inputs: int, tokens: int = 256) -> tuple[Tensor, Tensor]:
    """A weight, and second moments of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing_II = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0, 1, inputs)
    x_NI = torch.randn(tokens, inputs, generator=generator) @ mixing_II
    return torch.randn(rows, inputs, generator=generator), x_NI.T @ x_NI / tokens


def errors(weight: Tensor, second: Tensor, group: int) -> tuple[float, float]:
    """The outputs' error by nearest rounding, and by GPTQ, with the same scales."""
    scale = group_scales(weight, second.diagonal(), group, torch.float32)
    nearest, moved = round_groups(weight, scale), gptq(weight, second, scale)
    assert moved.dtype == torch.int8
    assert LOWEST <= int(moved.min()) <= int(moved.max()) <= HIGHEST
    by_nearest, by_gptq = (felt_error(weight, dequantize_groups(codes, scale), second) for codes in (nearest, moved))
    return by_nearest, by_gptq


@pytest.mark.parametrize("seed", range(5))
def test_the_outputs_change_less_than_by_nearest_rounding(seed: int):
    """Over two blocks of inputs, with groups that a block does not end with."""
    nearest, moved = errors(*drawn(seed, rows=24, inputs=192), group=64)
    assert moved < 0.8 * nearest


def test_every_choice_of_codes():
    """GPTQ is nearer than nearest rounding is to the best of all 16**4 roundings of a row."""
    codes = torch.tensor(list(itertools.product(range(LOWEST, HIGHEST + 1), repeat=4)), dtype=torch.int8)
    lost = {"nearest": 0.0, "gptq": 0.0}
    for seed in range(8):
        weight, second = drawn(seed, rows=1, inputs=4)
        scale = group_scales(weight, second.diagonal(), 4, torch.float32)
        off = dequantize_groups(codes, scale.expand(len(codes), 1)) - weight
        best = float(((off @ second) * off).sum(1).min())
        nearest, moved = errors(weight, second, group=4)
        assert min(nearest, moved) >= best * (1 - 1e-4)
        lost["nearest"] += nearest / best
        lost["gptq"] += moved / best
    assert lost["gptq"] < lost["nearest"]


def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_the_nearest():
    weight, _ = drawn(0, rows=8, inputs=160)
    scale = group_scales(weight, torch.ones(160), 32, torch.float32)
    assert torch.equal(gptq(weight, torch.diag(torch.linspace(0.1, 3, 160)), scale), round_groups(weight, scale))


def test_inputs_that_no_token_had():
    weight, second = drawn(0, rows=8, inputs=64)
    second[5], second[:, 5] = 0, 0
    scale = group_scales(weight, second.diagonal(), 32, torch.float32)
    assert torch.equal(gptq(weight, second, scale)[:, 5], round_groups(weight, scale)[:, 5])
    assert torch.equal(gptq(weight, torch.zeros(64, 64), scale), round_groups(weight, scale))


def test_a_scale_costs_no_more_than_the_widest_weight_would():
    """A lone large weight is clipped when the inputs do not feel it, and is not when they do."""
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)) * 0.1
    weight[0, 3] = 1.0
    quiet, loud = torch.ones(32), torch.ones(32)
    quiet[3], loud[3] = 1e-6, 1e6
    widest = 1.0 / HIGHEST
    assert group_scales(weight, quiet, 32, torch.float32).item() < 0.7 * widest
    assert dequantize_groups(*(lambda s: (round_groups(weight, s), s))(group_scales(weight, loud, 32, torch.float32)))[
        0, 3
    ].item() == pytest.approx(1.0, abs=1e-3)


def test_groups_of_zeros_and_scales_in_16_bits():
    weight = torch.zeros(2, 64)
    weight[1, 32:] = torch.linspace(-1, 1, 32)
    scale = group_scales(weight, torch.ones(64), 32, torch.bfloat16)
    assert scale.dtype == torch.bfloat16
    assert scale[0].tolist() == [1.0, 1.0]
    assert torch.equal(dequantize_groups(round_groups(weight, scale), scale)[0], torch.zeros(64))


def test_packing_is_compressed_tensors():
    """The package that transformers and vLLM read it with; every code is there."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32

    codes = torch.arange(LOWEST, HIGHEST + 1, dtype=torch.int8).repeat(3, 2).roll(5, 1)
    packed = pack_codes(codes)
    assert torch.equal(packed, pack_to_int32(codes, 4))
    assert torch.equal(unpack_codes(packed), codes)
    assert torch.equal(unpack_from_int32(packed, 4, codes.shape), codes)

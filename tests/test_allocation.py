"""AlphaPruning: the exponent of a tail that is known, and shares that add up below the limit."""

from __future__ import annotations

import math

import pytest
import torch

from pat_serve.training.sparse.allocation import LIMIT, allocate, mean_exponent, tail_exponent


def pareto_weight(alpha: float, size: int = 400) -> torch.Tensor:
    """A weight whose squared singular values are the quantiles of a power law of this exponent."""
    torch.manual_seed(0)
    quantiles = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    values = (1 - quantiles) ** (-1 / (alpha - 1))
    left, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    return (left * values.sqrt()) @ right


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_the_exponent_of_a_power_law_is_found(alpha: float):
    assert tail_exponent(pareto_weight(alpha)) == pytest.approx(alpha, rel=0.1)


def test_a_heavier_tail_has_the_smaller_exponent():
    heavy, light = (tail_exponent(pareto_weight(alpha)) for alpha in (2.0, 6.0))
    assert heavy < light


def test_shares_follow_alpha_and_hit_the_target_over_layers_of_any_size():
    sizes = [100, 300, 200]
    shares = allocate([2.0, 3.0, 5.0], sizes, 0.7, 0.3)
    assert shares == sorted(shares)
    mean = sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(0.7)
    # 1 - eps and 1 + eps, whatever they are scaled by.
    assert shares[2] / shares[0] == pytest.approx(1.3 / 0.7)


def test_no_share_passes_the_limit_and_the_others_take_the_rest():
    """The published code reaches 1.04 here."""
    shares = allocate([1.0, 2.0, 2.0, 3.0], [1, 1, 1, 1], 0.85, 0.3)
    assert max(shares) == LIMIT
    assert sum(shares) / 4 == pytest.approx(0.85)


def test_equal_exponents_get_equal_shares():
    assert allocate([2.0, 2.0], [10, 30], 0.5, 0.3) == pytest.approx([0.5, 0.5])


def test_a_linear_without_a_tail_says_nothing_of_its_layer():
    assert tail_exponent(torch.zeros(32, 32)) == tail_exponent(torch.eye(32)) == math.inf
    assert mean_exponent([2.0, math.inf, 4.0]) == 3.0
    assert mean_exponent([math.inf]) == math.inf


def test_a_layer_without_a_tail_gets_as_many_zeros_as_the_lightest():
    assert allocate([3.0, math.inf, 2.0], [10] * 3, 0.6, 0.3) == allocate([3.0, 3.0, 2.0], [10] * 3, 0.6, 0.3)
    assert allocate([math.inf] * 3, [10, 20, 30], 0.6, 0.3) == pytest.approx([0.6] * 3)

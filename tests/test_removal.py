"""The closed form of removing weights: against least squares, against every other set, and in blocks."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from pat_serve.cut.pattern import Pattern
from pat_serve.training.model.least_squares import RIDGE, Moments
from pat_serve.training.sparse.masks import least_joint_error, lowest, lowest_of_groups, obs_scores
from pat_serve.training.sparse.one_linear import Inputs, Zeroing, zeroed
from pat_serve.training.sparse.removal import joint_steps, removal_error, remove, single_steps, upper_factor

TWO_OF_FOUR = Pattern.parse("2:4")
# So little that it does not show in float64.
NO_DAMPING = 1e-12


def inputs_of(count: int, tokens: int = 400, seed: int = 0, share: float = 1.0) -> Tensor:
    """Inputs (tokens, count) that depend on one another, float64: otherwise nothing could make up for anything."""
    torch.manual_seed(seed)
    mixing = share * torch.randn(count, count, dtype=torch.float64) / count**0.5
    mixing += torch.eye(count, dtype=torch.float64)
    return torch.randn(tokens, count, dtype=torch.float64) @ mixing


def second_of(x_NI: Tensor) -> Tensor:
    return x_NI.T @ x_NI / len(x_NI)


def error(change_OI: Tensor, second_II: Tensor) -> Tensor:
    """Mean squared error of each output (O,)."""
    return ((change_OI @ second_II) * change_OI).sum(1)


def test_a_common_set_is_the_compensation_of_a_structured_cut():
    """Two ways to one equation: the closed form of the removal, and least squares on the channels that stay."""
    x_NI = inputs_of(12, share=0.2)
    weight_OI = torch.randn(5, 12, dtype=torch.float64)
    moments = Moments()
    moments.add(x_NI @ weight_OI.T, x_NI)
    second_II = moments.second()
    kept, removed = torch.tensor([0, 2, 3, 7, 9, 11]), torch.tensor([1, 4, 5, 6, 8, 10])
    change_OK, _ = moments.change(weight_OI[:, kept], kept, shrinkage=0.0)
    guess_OK = weight_OI[:, kept] + change_OK
    # The change is drawn to zero by its ridge, which the closed form has none of here.
    inverse_II = torch.linalg.inv(second_II)
    removed_OI, left_II = remove(weight_OI, inverse_II, removed)
    assert float((removed_OI[:, kept] - guess_OK).abs().max()) < 5 * RIDGE
    assert removed_OI[:, removed].abs().max() == 0
    cost_O = removal_error(weight_OI, inverse_II, removed)
    torch.testing.assert_close(error(removed_OI - weight_OI, second_II), cost_O)
    # The part that is left of the inverse equals the inverse of the part that is left.
    torch.testing.assert_close(left_II[kept][:, kept], torch.linalg.inv(second_II[kept][:, kept]))


def test_the_factor_gives_the_inverse_with_columns_frozen():
    second_II = second_of(inputs_of(10))
    factor_II = upper_factor(second_II, NO_DAMPING)
    for start in (0, 3, 7):
        wanted = torch.linalg.inv(second_II[start:, start:])
        torch.testing.assert_close(
            factor_II[start:, start:].T @ factor_II[start:, start:], wanted, rtol=1e-6, atol=1e-8
        )


def test_joint_steps_reach_the_least_error_of_each_row():
    x_NI = inputs_of(16)
    second_II, weight_OI = second_of(x_NI), torch.randn(6, 16, dtype=torch.float64)
    factor_II = upper_factor(second_II, NO_DAMPING)
    removed_OI = torch.rand(6, 16) < 0.5
    steps_OI = joint_steps(weight_OI, factor_II, removed_OI)
    sparse_OI = weight_OI - steps_OI @ factor_II
    assert float(sparse_OI[removed_OI].abs().max()) < 1e-8
    for row in range(6):
        kept = ~removed_OI[row]
        wanted = torch.linalg.lstsq(x_NI[:, kept], x_NI @ weight_OI[row]).solution
        torch.testing.assert_close(sparse_OI[row, kept], wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(steps_OI.square().sum(1), error(sparse_OI - weight_OI, second_II), rtol=1e-6, atol=1e-8)


def test_single_steps_never_beat_joint_ones():
    second_II, weight_OI = second_of(inputs_of(16)), torch.randn(40, 16, dtype=torch.float64)
    factor_II = upper_factor(second_II, NO_DAMPING)
    removed_OI = torch.rand(40, 16) < 0.5
    joint, single = (steps(weight_OI, factor_II, removed_OI).square().sum(1) for steps in (joint_steps, single_steps))
    assert bool((joint <= single * (1 + 1e-9)).all())
    assert bool((joint < 0.99 * single).any())


def test_mask_m_takes_the_best_of_all_sets_and_mask_s_does_not():
    second_II, weight_OI = second_of(inputs_of(4)), torch.randn(200, 4, dtype=torch.float64)
    inverse_II = torch.linalg.inv(second_II)
    factor_II = upper_factor(second_II, NO_DAMPING)
    every = torch.stack(
        [removal_error(weight_OI, inverse_II, torch.tensor(pair)) for pair in combinations(range(4), 2)]
    )
    costs = {}
    masks = {
        "M": least_joint_error(weight_OI, factor_II, TWO_OF_FOUR),
        "S": lowest_of_groups(obs_scores(weight_OI, factor_II), TWO_OF_FOUR),
    }
    for name, removed in masks.items():
        assert bool((removed.sum(1) == 2).all())
        costs[name] = joint_steps(weight_OI, factor_II, removed).square().sum(1)
    torch.testing.assert_close(costs["M"], every.min(0).values, rtol=1e-6, atol=1e-9)
    assert bool((costs["M"] <= costs["S"] * (1 + 1e-9)).all())
    assert bool((costs["M"] < 0.99 * costs["S"]).any())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "unstructured"])
def test_joint_compensation_beats_single_for_the_same_mask(pattern: str):
    """One block, so that both have the same mask to make up for, whatever the data."""
    x_NI = inputs_of(32, seed=3)
    inputs = Inputs(second_II=second_of(x_NI).float(), mean_I=x_NI.mean(0).float())
    weight_OI = torch.randn(24, 32)
    errors = {}
    for compensation in ("none", "S", "M"):
        how = Zeroing(pattern=Pattern.parse(pattern), sparsity=0.5, mask="wanda", compensation=compensation)
        sparse_OI = zeroed(weight_OI, inputs, how)
        assert Pattern.parse(pattern).held_by(sparse_OI)
        errors[compensation] = inputs.error(sparse_OI - weight_OI)
    assert errors["M"] < errors["S"] < errors["none"]


@pytest.mark.parametrize("block", [8, 12, 64])
def test_blocks_leave_the_pattern_and_the_share(block: int):
    x_NI = inputs_of(64, seed=1)
    inputs = Inputs(second_II=second_of(x_NI).float(), mean_I=x_NI.mean(0).float())
    weight_OI = torch.randn(16, 64)
    for mask in ("S", "M"):
        how = Zeroing(pattern=TWO_OF_FOUR, sparsity=0.5, mask=mask, compensation="M", block=block)
        assert float((zeroed(weight_OI, inputs, how) == 0).float().mean()) == 0.5
    how = Zeroing(pattern=Pattern(), sparsity=0.25, mask="S", compensation="S", block=block)
    assert float((zeroed(weight_OI, inputs, how) == 0).float().mean()) == 0.25


def test_inputs_that_are_always_zero_go_first():
    x_NI = inputs_of(16)
    x_NI[:, [3, 8]] = 0
    inputs = Inputs(second_II=second_of(x_NI).float(), mean_I=x_NI.mean(0).float())
    weight_OI = torch.randn(8, 16)
    how = Zeroing(pattern=Pattern(), sparsity=0.25, mask="S", compensation="M")
    sparse_OI = zeroed(weight_OI, inputs, how)
    assert bool((sparse_OI[:, [3, 8]] == 0).all())
    assert bool(torch.isfinite(sparse_OI).all())


def test_shares_are_of_rows_or_of_all():
    scores = torch.arange(24.0).view(4, 6)
    assert lowest(scores, 0.5, by_row=True).sum(1).tolist() == [3, 3, 3, 3]
    assert lowest(scores, 0.5, by_row=False).sum(1).tolist() == [6, 6, 0, 0]

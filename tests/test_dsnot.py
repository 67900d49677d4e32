"""DSnoT: the mean output's error falls, and the mask keeps its pattern."""

from __future__ import annotations

import pytest
import torch

from pat_serve.cut.pattern import Pattern
from pat_serve.training.sparse.dsnot import mean_errors, refine
from pat_serve.training.sparse.masks import lowest, lowest_of_groups, wanda_scores


@pytest.mark.parametrize(("name", "left"), [("unstructured", 0.2), ("2:4", 0.4)])
def test_no_row_gets_worse_and_the_mean_falls(name: str, left: float):
    torch.manual_seed(0)
    pattern = Pattern.parse(name)
    weight_OI, mean_I = torch.randn(64, 96), torch.randn(96)
    energies_I = mean_I.square() + torch.rand(96) + 0.1
    scores = wanda_scores(weight_OI, energies_I)
    removed = lowest_of_groups(scores, pattern) if pattern.group else lowest(scores, 0.5, by_row=True)
    refined = refine(removed, weight_OI, mean_I, energies_I, pattern)
    before, after = (mean_errors(mask, weight_OI, mean_I).abs() for mask in (removed, refined))
    assert bool((after <= before + 1e-6).all())
    assert float(after.mean()) < left * float(before.mean())
    assert refined.sum(1).equal(removed.sum(1))
    assert pattern.held_by(weight_OI.masked_fill(refined, 0))


def test_a_mask_without_an_error_stays():
    weight_OI, mean_I = torch.randn(8, 16), torch.zeros(16)
    removed = lowest(weight_OI.abs(), 0.5, by_row=True)
    assert refine(removed, weight_OI, mean_I, torch.ones(16), Pattern()).equal(removed)


def test_it_swaps_no_more_than_it_may():
    torch.manual_seed(1)
    weight_OI, mean_I = torch.randn(8, 64), torch.ones(64)
    removed = lowest(weight_OI.abs(), 0.5, by_row=True)
    refined = refine(removed, weight_OI, mean_I, 2 * torch.ones(64), Pattern(), most_swaps=1)
    assert int((refined != removed).sum(1).max()) == 2

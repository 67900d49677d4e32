from __future__ import annotations

import math

import pytest
import torch

from pat_serve.training.methods.pat.losses import count_loss, identity_loss, kept_channels, push_loss


def logits(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_a_logit_of_zero_is_kept():
    assert kept_channels(logits(0.0, -1e-9, 1.0)).tolist() == [True, False, True]


def test_count_loss_value_and_straight_through_gradient():
    m = logits(1.0, 2.0, 3.0, -1.0)  # three kept, two wanted
    loss = count_loss(m, 2)
    loss.backward()
    assert loss.item() == pytest.approx(10 * 1 / 2)
    assert m.grad is not None
    # Too many kept: every logit is pushed down by the same 10 / K, the pruned one too.
    assert m.grad.tolist() == pytest.approx([5.0] * 4)


def test_count_loss_pulls_up_when_too_few_are_kept():
    m = logits(1.0, -2.0, -3.0, -1.0)
    count_loss(m, 2).backward()
    assert m.grad is not None
    assert m.grad.tolist() == pytest.approx([-5.0] * 4)


def test_count_loss_is_zero_at_the_target():
    assert count_loss(logits(1.0, 0.0, -1.0), 2).item() == 0.0


def test_push_loss_value_and_gradient():
    m = logits(1.0, 0.0, -1.5)
    loss = push_loss(m)
    loss.backward()
    # kept: ((1 - .5)^2 + (0 - .5)^2) / 2 = .25; pruned: (-1.5 + .5)^2 = 1
    assert loss.item() == pytest.approx(1.25)
    assert m.grad is not None
    assert m.grad.tolist() == pytest.approx([0.5, -0.5, -2.0])


@pytest.mark.parametrize("values", [(0.0, 0.0), (-1.0, -2.0)])
def test_push_loss_of_an_empty_side_is_finite(values: tuple[float, ...]):
    m = logits(*values)
    loss = push_loss(m)
    loss.backward()
    assert m.grad is not None
    assert math.isfinite(loss.item())
    assert torch.isfinite(m.grad).all()


def test_identity_loss_of_orthonormal_rows_is_zero():
    q, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    assert identity_loss([q[:4], q[4:]]).item() == pytest.approx(0.0, abs=1e-20)


def test_identity_loss_sums_over_every_module_and_reaches_every_factor():
    factors = [torch.full((2, 3), value, dtype=torch.float64, requires_grad=True) for value in (1.0, 2.0)]
    loss = identity_loss(factors)
    loss.backward()
    # L0 L0^T is 3 v^2 everywhere; v = 1: (2^2 + 2^2 + 3^2 + 3^2) / 4; v = 2: (11^2 + 11^2 + 12^2 + 12^2) / 4
    assert loss.item() == pytest.approx(26 / 4 + 530 / 4)
    for factor in factors:
        assert factor.grad is not None
        assert factor.grad.abs().min() > 0


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    m = torch.randn(7, dtype=torch.float64).requires_grad_()
    l0 = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(push_loss, (m,))
    assert torch.autograd.gradcheck(lambda factor: identity_loss([factor]), (l0,))

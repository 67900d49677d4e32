from __future__ import annotations

import pytest
import torch

from pat_serve.cut.hybrid import apply_hybrid
from pat_serve.training.methods.pat.hsm import HybridModule, SharedMask
from pat_serve.training.methods.pat.schedule import GateSchedule

D, K, R = 16, 12, 4


def mask(milestone: int = 10) -> SharedMask:
    return SharedMask(D, K, GateSchedule(milestone=milestone))


def test_starts_as_the_identity():
    torch.manual_seed(0)
    hsm = HybridModule(D, R, mask())
    x = torch.randn(2, 3, D)
    assert torch.equal(hsm(x), x)


def test_operator_is_the_papers():
    torch.manual_seed(0)
    shared = mask()
    hsm = HybridModule(D, R, shared)
    torch.nn.init.normal_(hsm.l1_DR)
    torch.nn.init.normal_(hsm.scale_D)
    torch.nn.init.normal_(shared.logits_D)
    shared.set_step(4)
    x = torch.randn(2, 3, D)
    operator = torch.diag(hsm.scale_D * shared.gate()) @ (torch.eye(D) + hsm.l1_DR @ hsm.l0_RD)
    torch.testing.assert_close(hsm(x), x @ operator.T)


def test_the_gate_trains_the_logits_until_the_freeze():
    shared = mask()
    for step in (0, 3, shared.schedule.freeze_step - 1):
        shared.set_step(step)
        (gradient,) = torch.autograd.grad(shared.gate().sum(), shared.logits_D)
        assert (gradient > 0).all()
    shared.set_step(shared.schedule.freeze_step)
    assert not shared.gate().requires_grad
    assert not shared.logits_D.requires_grad


def test_the_freeze_keeps_exactly_k_the_largest():
    torch.manual_seed(0)
    shared = mask()
    with torch.no_grad():
        shared.logits_D.normal_()
    shared.set_step(shared.schedule.freeze_step)
    gate = shared.gate()
    assert set(gate.tolist()) == {0.0, 1.0}
    assert gate.sum() == K
    largest = torch.topk(shared.logits_D, K).indices.sort().values
    assert torch.equal(gate.nonzero().flatten(), largest)
    assert torch.equal(shared.kept_indices(), largest)


def test_equal_logits_still_give_exactly_k():
    shared = mask()
    shared.set_step(shared.schedule.freeze_step)
    assert shared.gate().sum() == K
    assert shared.kept_indices().tolist() == list(range(K))


def test_the_frozen_gate_does_not_move():
    torch.manual_seed(0)
    shared = mask()
    with torch.no_grad():
        shared.logits_D.normal_()
    shared.set_step(8)
    before = shared.gate().clone()
    with torch.no_grad():
        shared.logits_D.neg_()
    shared.set_step(20)
    assert torch.equal(shared.gate(), before)


def test_freeze_gap_tells_how_soft_the_gate_was():
    polarised, undecided = mask(1000), mask(1000)
    with torch.no_grad():
        polarised.logits_D.fill_(0.5)[K:] = -0.5
    for shared in (polarised, undecided):
        shared.set_step(shared.schedule.freeze_step)
    assert polarised.freeze_gap < 1e-6
    assert undecided.freeze_gap == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_are_those_of_the_plain_formula(dtype: torch.dtype):
    torch.manual_seed(0)
    shared = mask()
    hsm = HybridModule(D, R, shared)
    torch.nn.init.normal_(hsm.l1_DR)
    torch.nn.init.normal_(shared.logits_D)
    shared.set_step(4)
    x = torch.randn(2, 3, D, dtype=dtype, requires_grad=True)
    weights = torch.randn(2, 3, D)
    inputs = (x, hsm.l0_RD, hsm.l1_DR, hsm.scale_D, shared.logits_D)
    ours, plain = hsm(x), apply_hybrid(x, hsm.operator(), shared.gate())
    assert ours.dtype == dtype
    assert torch.equal(ours, plain)
    for mine, reference in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((plain * weights).sum(), inputs),
        strict=True,
    ):
        assert mine.dtype == reference.dtype
        torch.testing.assert_close(mine, reference, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_an_operator_it_is_the_scale_and_the_gate(dtype: torch.dtype):
    torch.manual_seed(0)
    shared = SharedMask(D, K, GateSchedule(milestone=10, kind="cut"))
    shared.set_step(0)
    hsm = HybridModule(D, 0, shared)
    torch.nn.init.normal_(hsm.scale_D)
    x = torch.randn(2, 3, D, dtype=dtype, requires_grad=True)
    ours, plain = hsm(x), apply_hybrid(x, hsm.operator(), shared.gate())
    assert torch.equal(ours, plain)
    assert ours.dtype == dtype
    kept = shared.kept_indices()
    hsm.narrow(kept)
    assert torch.equal(hsm(x[..., kept]), plain[..., kept])


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    hsm = HybridModule(D, R, mask()).double()
    torch.nn.init.normal_(hsm.l1_DR)
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: hsm(x), (x, hsm.l0_RD, hsm.l1_DR, hsm.scale_D))


def test_one_activation_and_the_thin_one_are_kept():
    kept: list[int] = []
    hsm = HybridModule(D, R, mask())
    x = torch.randn(50, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        hsm(x)
    assert sorted(size for size in kept if size > D * R) == [50 * R, 50 * D]

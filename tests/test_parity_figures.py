"""The figures of the gate, by hand: logits, greedy text, and listed log-probabilities."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pat_serve.export.parity.figures import TOLERANCES, Figures, HeldLogits, compare_logits
from pat_serve.export.parity.greedy import compare_greedy
from pat_serve.export.parity.vllm_scores import compare_listed
from pat_serve.scores import ListedScores


def test_compare_logits_figures():
    trained = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    exported = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    figures = compare_logits(HeldLogits(values_PV=trained), HeldLogits(values_PV=exported))
    assert figures.max_abs == 1.0
    assert figures.logits_std == pytest.approx(trained.std().item())
    assert figures.top1_agreement == 0.5
    # KL between (p, 1-p) and (1-p, p) with p = sigmoid(1) is (2p - 1) * 1, over two positions of which one differs.
    assert figures.mean_kl_nats == pytest.approx((2 * torch.sigmoid(torch.tensor(1.0)).item() - 1) / 2, rel=1e-6)
    tolerance = TOLERANCES[torch.float32]
    assert not figures.within(tolerance)
    right = dataclasses.replace(figures, max_abs_over_std=0.0, mean_kl_nats=0.0, top1_agreement=1.0)
    assert right.within(tolerance)
    assert not dataclasses.replace(right, max_abs_over_std=float("nan")).within(tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_compared_as_often_as_is_asked(dtype: torch.dtype):
    first, second = (torch.randn(70, 5000, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    before = first.clone(), second.clone()
    figures = compare_logits(HeldLogits(values_PV=first), HeldLogits(values_PV=second))
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])
    a, b = (logits.double().log_softmax(-1) for logits in before)
    kl = (a.exp() * (a - b)).sum(-1)
    assert figures.mean_kl_nats == pytest.approx(float(kl.mean()), rel=1e-9)
    assert figures.median_kl_nats == pytest.approx(float(kl.median()), rel=1e-9)
    assert figures.max_abs == pytest.approx(float((before[0] - before[1]).abs().max()), rel=1e-6)
    assert figures.top1_agreement == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).double().mean()))


def test_a_greedy_text_may_part_at_a_tie_only():
    trained = [[1, 2, 0]]
    logits = [torch.tensor([[0.0, 9.0, 1.0], [0.0, 5.0, 5.0 + 1e-5], [9.0, 0.0, 0.0]])]
    tolerance = TOLERANCES[torch.float32]

    def compare(other: list[int]) -> tuple[int, bool]:
        found = compare_greedy(trained, logits, [other], logits_std=1.0, tolerance=tolerance)
        return found.equal, found.passed

    assert compare([1, 2, 0]) == (1, True)
    assert compare([1, 1, 2]) == (0, True)  # what comes after a tie has another prompt
    assert compare([1, 0, 0]) == (0, False)
    assert compare([1, 2, 1]) == (0, False)


def test_listed_logprobs_give_the_figures_of_all():
    """With the whole vocabulary listed nothing is lost; with a part the KL is never larger."""
    generator = torch.Generator().manual_seed(0)
    trained, other = (torch.randn(9, 3000, generator=generator) for _ in range(2))
    other = trained + 0.1 * other
    prompts = [[1, 2, 3, 4], [5, 6, 7, 8, 9]]
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    whole = compare_logits(HeldLogits(values_PV=trained[kept]), HeldLogits(values_PV=other[kept]))

    def listed(count: int) -> Figures:
        logprobs, ids = other.log_softmax(-1).double().sort(descending=True)
        scores = [
            ListedScores(token_ids=ids[at, :count].tolist(), logprobs=logprobs[at, :count].tolist())
            for at in (slice(0, 3), slice(4, 8))
        ]
        return compare_listed(HeldLogits(values_PV=trained), prompts, scores, whole.logits_std)

    everything, few = listed(3000), listed(20)
    assert everything.positions == few.positions == 7
    assert everything.mean_kl_nats == pytest.approx(whole.mean_kl_nats, rel=1e-4)
    assert everything.top1_agreement == few.top1_agreement == whole.top1_agreement
    assert 0 < few.mean_kl_nats < whole.mean_kl_nats
    assert few.max_abs_over_std <= everything.max_abs_over_std

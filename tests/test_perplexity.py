from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pat_serve.perplexity import measure_perplexity, next_token_nll, summarize_nll
from tests.tiny_models import tiny_llama


def test_equals_the_models_own_loss(tiny_base: Path):
    """Examples of several lengths in one padded batch, against transformers' loss one at a time."""
    torch.manual_seed(0)
    model = tiny_llama()
    examples, sums, count = [], 0.0, 0
    for length in (5, 11, 7):
        ids = torch.randint(384, (length,))
        labels = ids.clone()
        labels[:3] = -100
        examples.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
        with torch.no_grad():
            loss = model(input_ids=ids[None], labels=labels[None]).loss.item()
        sums += loss * (length - 3)
        count += length - 3
    measured = measure_perplexity(tiny_base, examples, dtype=torch.float32, batch_size=2)
    assert measured.tokens == count
    assert measured.perplexity == pytest.approx(math.exp(sums / count), rel=1e-5)


def test_positions_that_do_not_count():
    """Logits that are not numbers do no harm where no label counts, and a row without any has nothing."""
    labels_BT = torch.tensor([[-100, -100, 2], [-100, -100, -100]])
    logits_BTV = torch.zeros(2, 3, 4)
    logits_BTV[0, 0] = logits_BTV[1] = math.nan
    nll_BT, counted_BT = next_token_nll(logits_BTV, labels_BT)
    assert nll_BT.tolist() == [[0.0, pytest.approx(math.log(4))], [0.0, 0.0]]
    assert counted_BT.tolist() == [[False, True], [False, False]]


def test_summary_by_hand():
    # Two examples of 2 and 4 tokens, mean 1 and 2.5 nats: 12 nats over 6 tokens; residuals 2 - 4 and 10 - 8.
    measured = summarize_nll(torch.tensor([2.0, 10.0]), torch.tensor([2, 4]))
    assert measured.nll_nats == pytest.approx(2.0)
    assert measured.perplexity == pytest.approx(math.e**2)
    assert measured.nll_standard_error_nats == pytest.approx(math.sqrt(8) / 6)

"""Compare with a runtime that gives log-probabilities of the likeliest tokens only, as vLLM does.

Shape suffixes: P positions, L listed tokens of a position, V a block of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pat_serve.export.parity.figures import VOCAB_BLOCK, Figures, Logits, RunningSoftmax
from pat_serve.scores import ListedScores


def compare_listed(
    trained: Logits, prompts: Sequence[Sequence[int]], scores: Sequence[ListedScores], logits_std: float
) -> Figures:
    """Compute the figures of a runtime that lists some tokens for each position.

    Log-probabilities are compared instead of logits: a shift of all logits of a position does not change the model.
    The KL is that between the listed tokens and all others taken as one. It is never more than the true KL, and equals
    it where the whole vocabulary is listed.

    Args:
        trained: the trained model's logits at every position of the prompts.
        prompts: token ids.
        scores: the runtime's, for all positions but the last of each prompt.
        logits_std: of the trained model.
    """
    kept = _positions_with_a_successor(prompts)
    trained = trained.at(kept)
    rows = [row for score in scores for row in zip(score.token_ids, score.logprobs, strict=True)]
    assert len(rows) == len(kept)
    width = max(len(ids) for ids, _ in rows)
    # A short row repeats its first token, which must count once.
    ids_PL = torch.tensor([[*ids, *[ids[0]] * (width - len(ids))] for ids, _ in rows])
    counts_PL = torch.tensor([[True] * len(ids) + [False] * (width - len(ids)) for ids, _ in rows])
    theirs_PL = torch.tensor([[*lps, *[lps[0]] * (width - len(lps))] for _, lps in rows], dtype=torch.float64)
    ours_PL, best_P = _logprobs_of(trained, ids_PL)
    difference_PL = (ours_PL - theirs_PL).abs()
    p_PL, q_PL = (torch.where(counts_PL, logprobs.exp(), 0.0) for logprobs in (ours_PL, theirs_PL))
    others_p_P, others_q_P = ((1 - shares.sum(1)).clamp(min=1e-300) for shares in (p_PL, q_PL))
    kl_P = (p_PL * (ours_PL - theirs_PL)).sum(1) + others_p_P * (others_p_P / others_q_P).log()
    max_abs = float(difference_PL.max())
    return Figures(
        positions=len(kept),
        max_abs=max_abs,
        logits_std=logits_std,
        max_abs_over_std=max_abs / logits_std,
        mean_kl_nats=float(kl_P.mean()),
        median_kl_nats=float(kl_P.median()),
        top1_agreement=float((best_P == ids_PL[:, 0]).double().mean()),
    )


def _positions_with_a_successor(prompts: Sequence[Sequence[int]]) -> Tensor:
    kept: list[int] = []
    start = 0
    for prompt in prompts:
        kept += range(start, start + len(prompt) - 1)
        start += len(prompt)
    return torch.tensor(kept)


def _logprobs_of(logits: Logits, ids_PL: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (P, L) of some tokens of each position, and the greedy token (P,)."""
    softmax = RunningSoftmax(logits.positions)
    chosen_PL = torch.zeros(ids_PL.shape, dtype=torch.float64)
    for start in range(0, logits.vocab_size, VOCAB_BLOCK):
        stop = min(start + VOCAB_BLOCK, logits.vocab_size)
        block_PV = logits.block(start, stop).double()
        softmax.add(block_PV, start)
        inside_PL = (ids_PL >= start) & (ids_PL < stop)
        found_PL = block_PV.gather(1, (ids_PL - start).clamp(0, stop - start - 1))
        chosen_PL = torch.where(inside_PL, found_PL, chosen_PL)
    return chosen_PL - softmax.log_sum()[:, None], softmax.best_P

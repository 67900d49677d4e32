"""Held-out perplexity of the responses while a run trains, for the Trainer's own evaluation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pat_serve.perplexity import next_token_nll


def response_nll(logits_BTV: Tensor | tuple[Tensor, ...], labels_BT: Tensor) -> Tensor:
    """Reduce a batch's logits to each row's summed negative log-likelihood in nats and its labelled tokens.

    Returns:
        float64 (batch, 2).
    """
    logits_BTV = logits_BTV[0] if isinstance(logits_BTV, tuple) else logits_BTV
    nll_BT, counted_BT = next_token_nll(logits_BTV, labels_BT)
    # MPS has no float64; a row's sum is short.
    wide = torch.float32 if nll_BT.device.type == "mps" else torch.float64
    return torch.stack([nll_BT.to(wide).sum(1), counted_BT.sum(1).to(wide)], dim=1)


def response_perplexity(prediction: Any) -> dict[str, float]:
    """Over all labelled tokens of all rows, as `pat-eval` counts: exp of the mean negative log-likelihood.

    Args:
        prediction: transformers' EvalPrediction with `response_nll` of all rows.
    """
    nll, tokens = prediction.predictions.sum(axis=0)
    mean = float(nll / tokens)
    return {"nll": mean, "perplexity": math.exp(min(mean, 700.0))}

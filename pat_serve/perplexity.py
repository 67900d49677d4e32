"""Measure the perplexity of a checkpoint on labelled token ids, through stock transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pat_serve.terminal.progress import track

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity over all labelled tokens of a data set.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per labelled token.
        nll_nats: that mean.
        nll_standard_error_nats: standard error of that mean, over examples (tokens of one example are not independent).
        tokens: labelled tokens.
        examples: rows.
    """

    perplexity: float
    nll_nats: float
    nll_standard_error_nats: float
    tokens: int
    examples: int


def measure_perplexity(
    folder: Path, examples: Sequence[dict[str, list[int]]], *, dtype: torch.dtype, batch_size: int = 16
) -> Perplexity:
    """Load a checkpoint with AutoModelForCausalLM and measure it; see `measure_nll` for the arguments."""
    return summarize_nll(*measure_nll(folder, examples, dtype=dtype, batch_size=batch_size))


def measure_nll(
    folder: Path, examples: Sequence[dict[str, list[int]]], *, dtype: torch.dtype, batch_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Measure the negative log-likelihood of every example with a checkpoint that AutoModelForCausalLM loads.

    Args:
        folder: a local checkpoint.
        examples: `input_ids` and `labels` each, where -100 marks a token that does not count.
        dtype: to compute in; log-likelihoods are summed in float64.
        batch_size: examples at a time.

    Returns:
        sums_N in nats and counts_N of labelled tokens, in the examples' order.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    # Examples of like length share a batch, so that little is padding.
    order = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    sums_N = torch.zeros(len(examples), dtype=torch.float64)
    counts_N = torch.zeros(len(examples), dtype=torch.long)
    for batch in track(batches, f"perplexity of {folder.name}", len(batches)):
        sums_N[batch], counts_N[batch] = _batch_nll(model, [examples[index] for index in batch], device)
    return sums_N, counts_N


def summarize_nll(sums_N: Tensor, counts_N: Tensor) -> Perplexity:
    """Perplexity from each example's summed negative log-likelihood and its number of labelled tokens.

    The standard error is that of a ratio estimator: sqrt(sum((s_i - m c_i)^2)) / sum(c_i).
    """
    sums_N, counts_N = sums_N.double(), counts_N.double()
    tokens = float(counts_N.sum())
    mean = float(sums_N.sum()) / tokens
    error = float((sums_N - mean * counts_N).square().sum().sqrt()) / tokens
    return Perplexity(
        perplexity=math.exp(mean),
        nll_nats=mean,
        nll_standard_error_nats=error,
        tokens=int(tokens),
        examples=len(sums_N),
    )


@torch.no_grad()
def _batch_nll(model: nn.Module, batch: Sequence[dict[str, list[int]]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Summed NLL and number of labelled tokens of each example of a batch, on the CPU."""
    longest = max(len(example["input_ids"]) for example in batch)
    input_ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    labels_BT = torch.full((len(batch), longest), IGNORED_LABEL)
    mask_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, example in enumerate(batch):
        length = len(example["input_ids"])
        input_ids_BT[row, :length] = torch.tensor(example["input_ids"])
        labels_BT[row, :length] = torch.tensor(example["labels"])
        mask_BT[row, :length] = 1
    logits_BTV = model(input_ids=input_ids_BT.to(device), attention_mask=mask_BT.to(device)).logits
    nll_BT, counted_BT = next_token_nll(logits_BTV, labels_BT)
    return nll_BT.double().sum(1).cpu(), counted_BT.sum(1).cpu()


def next_token_nll(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each position's next token, computed where a label counts alone.

    The softmax runs along the vocabulary as it lies in memory, and not for a prompt's or a padding's positions.

    Args:
        logits_BTV: of any float dtype; the softmax is computed in float32.
        labels_BT: -100 marks a token that does not count.

    Returns:
        float32 (batch, positions - 1) in nats, 0 where nothing counts, and which positions count.
    """
    targets_BT = labels_BT[:, 1:].to(logits_BTV.device)
    counted_BT = targets_BT != IGNORED_LABEL
    nll_BT = torch.zeros(targets_BT.shape, device=logits_BTV.device)
    nll_BT[counted_BT] = F.cross_entropy(
        logits_BTV[:, :-1][counted_BT].float(), targets_BT[counted_BT], reduction="none"
    )
    return nll_BT, counted_BT

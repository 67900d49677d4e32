"""How many zeros each layer gets, as pure maths: by how heavy-tailed the spectra of its weights are (AlphaPruning).

AlphaPruning (arXiv 2410.10912): a layer whose eigenvalues of W W^T have the heavier tail, so the smaller exponent
alpha, has learnt more and keeps more. The tail begins where a power law fits it best.

The published code looks for that place among all eigenvalues up to 1.5 times the histogram's peak: its lower bound
compares an eigenvalue with a logarithm, and bounds nothing. So does this one. The published code also lets a layer's
share of zeros pass 1; here it stays below a limit, and the other layers take what it cannot.

Shape suffixes: N eigenvalues, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BINS = 100
_WINDOW = 1.5
# No layer gets a larger share of zeros.
LIMIT = 0.99


def tail_exponent(weight_OI: Tensor) -> float:
    """Alpha of the power law that fits the tail of a weight's squared singular values best, by Kolmogorov-Smirnov."""
    values_N = torch.linalg.svdvals(weight_OI.float()).square().double().sort().values
    values_N = values_N[values_N > 0]
    if len(values_N) < 3:
        return torch.inf  # a weight of rank one or two has no tail to speak of
    logs_N = values_N.log()
    counts = torch.histc(logs_N / torch.log(torch.tensor(10.0)), bins=_BINS)
    low, high = float(logs_N[0]), float(logs_N[-1])
    peak = low + (high - low) * int(counts.argmax()) / _BINS
    candidates = (values_N[:-1] <= _WINDOW * torch.tensor(peak, dtype=torch.float64).exp()).nonzero()[:, 0]
    best_distance, best = torch.inf, torch.inf
    for at in (candidates if len(candidates) else torch.tensor([0])).tolist():
        tail_N = logs_N[at:]
        total = float((tail_N - tail_N[0]).sum())
        if total <= 0:
            continue
        alpha = 1 + len(tail_N) / total
        fitted_N = 1 - ((1 - alpha) * (tail_N - tail_N[0])).exp()
        steps_N = torch.arange(len(tail_N), dtype=torch.float64) / len(tail_N)
        distance = float((fitted_N - steps_N).abs().max())
        if distance < best_distance:
            best_distance, best = distance, alpha
    return best


def mean_exponent(exponents: Sequence[float]) -> float:
    """The mean alpha of a layer's linears; a linear without a tail, as one of zeros, says nothing of its layer."""
    finite = [exponent for exponent in exponents if math.isfinite(exponent)]
    return sum(finite) / len(finite) if finite else math.inf


def allocate(exponents: Sequence[float], parameters: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Share of zeros by layer, whose mean over all parameters is the sparsity.

    Args:
        exponents: mean alpha of each layer's linears; infinite for a layer of which no linear has a tail. Such a layer
            gets as many zeros as the one with the lightest tail.
        parameters: entries of each layer's linears.
        sparsity: share of zeros in all layers together.
        spread: eps: before they are scaled, the shares go from 1 - eps to 1 + eps times the sparsity, in alpha's order.
    """
    alphas_L, sizes_L = torch.tensor(exponents, dtype=torch.float64), torch.tensor(parameters, dtype=torch.float64)
    has_tail_L = alphas_L.isfinite()
    if has_tail_L.any():
        alphas_L[~has_tail_L] = alphas_L[has_tail_L].max()
    else:
        alphas_L.fill_(1.0)
    low, high = float(alphas_L.min()), float(alphas_L.max())
    places_L = (alphas_L - low) / (high - low) if high > low else torch.full_like(alphas_L, 0.5)
    factors_L = 2 * spread * places_L + 1 - spread
    shares_L = torch.zeros_like(factors_L)
    open_L = torch.ones_like(factors_L, dtype=torch.bool)
    left = sparsity * float(sizes_L.sum())
    # Each round closes the layers that are full; what they cannot take goes to the others.
    while open_L.any():
        scale = left / float((sizes_L * factors_L)[open_L].sum())
        shares_L[open_L] = (factors_L * scale)[open_L]
        full_L = open_L & (shares_L > LIMIT)
        if not full_L.any():
            break
        shares_L[full_L] = LIMIT
        left -= LIMIT * float(sizes_L[full_L].sum())
        open_L &= ~full_L
    return [float(share) for share in shares_L]

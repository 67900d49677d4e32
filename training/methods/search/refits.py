"""Refitted output weights of layers for any kept inputs, from moments that are taken once on the dense model.

With H the second moment of a linear's inputs and K the inputs that stay, W' = W H_:K (H_KK + ridge)^-1: least squares
of the outputs on what is left. The paper (arXiv 2409.17372) iterates an ADMM towards the same weights; with whole
columns kept the limit is this, and one solve costs less than an iteration.

Shape suffixes: N tokens, I inputs of a linear, K those that stay, O outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pat_serve.cut.axes import AXES
from pat_serve.cut.cuts import line_name
from pat_serve.families.family import Family
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.terminal.progress import track
from pat_serve.training.choices.base import Inputs
from pat_serve.training.methods.search.genome import Genome
from pat_serve.training.model.least_squares import RIDGE
from pat_serve.training.model.passes import evaluating, run_decoder

# Refitted weights that are kept for candidates to come.
CACHED_BYTES = 2_000_000_000


class Refits:
    """The writers of the inner axes, their dense weights, and the moments of their inputs.

    Args:
        model: the dense causal language model.
        family: its architecture.
        sizes: of the model.
        axes: whose writers a candidate may cut.
        rows: padded batches: input_ids and attention_mask.
    """

    def __init__(
        self, model: Any, family: Family, sizes: ModelSizes, axes: Collection[str], rows: Sequence[dict[str, Tensor]]
    ) -> None:
        self.sizes = sizes
        self.writers: dict[str, nn.Linear] = {}
        for name, spec, layer in family.modules(sizes.layers):
            axis = spec.dims[-1][0].axis
            if layer is not None and spec.writes_residual and axis in axes:
                self.writers[line_name(axis, layer)] = model.get_submodule(name)
        self.dense = {line: writer.weight.detach().clone() for line, writer in self.writers.items()}
        self.seconds = self._measure(model, rows)
        self._cache: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._loaded: dict[str, tuple[int, ...] | None] = dict.fromkeys(self.writers)

    @torch.no_grad()
    def _measure(self, model: Any, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        seconds: dict[str, Tensor] = {}
        real_BT: Tensor

        def listen(line: str, inputs: tuple[Tensor, ...]) -> None:
            z_NI = inputs[0][real_BT].float()
            second_II = z_NI.T @ z_NI
            seconds[line] = seconds[line] + second_II if line in seconds else second_II

        handles = [
            writer.register_forward_pre_hook(lambda _m, inputs, line=line: listen(line, inputs))
            for line, writer in self.writers.items()
        ]
        with evaluating(model, handles):
            for row in track(rows, "measure the dense model", len(rows)):
                real_BT = row["attention_mask"].to(model.device).bool()
                run_decoder(model, row)
        return seconds

    def inputs(self, line: str) -> Inputs:
        """The data that a choice looks at."""
        axis = line.partition(".")[0]
        block = self.dense[line].shape[1] // AXES[axis].length(self.sizes)
        return Inputs(second_II=self.seconds[line].double(), weight_OI=self.dense[line].double(), block=block)

    @torch.no_grad()
    def load(self, genome: Genome | None) -> None:
        """Give the model a candidate's weights, with zeros for inputs that go; None: the dense ones."""
        for line, writer in self.writers.items():
            kept = None if genome is None else genome.of(line)
            if self._loaded[line] == kept:
                continue
            writer.weight.data.copy_(self.dense[line] if kept is None else self.refitted(line, kept))
            self._loaded[line] = kept

    def refitted(self, line: str, kept: tuple[int, ...]) -> Tensor:
        """A writer's weight (O, I) for kept indices, zeros at all others."""
        key = (line, kept)
        if key not in self._cache:
            weight_OI, second_II = self.dense[line], self.seconds[line]
            block = weight_OI.shape[1] // AXES[line.partition(".")[0]].length(self.sizes)
            at_K = (torch.tensor(kept)[:, None] * block + torch.arange(block)).flatten().to(second_II.device)
            refitted_OI = torch.zeros_like(weight_OI)
            refitted_OI[:, at_K] = refit_columns(weight_OI, second_II, at_K).to(weight_OI)
            while self._cache and refitted_OI.nbytes * (len(self._cache) + 1) > CACHED_BYTES:
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = refitted_OI
        return self._cache[key]


def refit_columns(weight_OI: Tensor, second_II: Tensor, at_K: Tensor) -> Tensor:
    """W H_:K (H_KK + ridge)^-1, (O, K), in float64.

    Args:
        weight_OI: the dense weight.
        second_II: H.
        at_K: int64, the inputs that stay.
    """
    second_IK = second_II[:, at_K].double()
    second_KK = second_IK[at_K]
    ridge = RIDGE * float(second_KK.diagonal().mean()) or 1.0
    factor_KK = torch.linalg.cholesky(second_KK + ridge * torch.eye(len(at_K), dtype=torch.float64, device=at_K.device))
    return torch.cholesky_solve((weight_OI.double() @ second_IK).T, factor_KK).T


def removal_errors(inputs: Inputs) -> Tensor:
    """The error that is left when one index goes and all others make up for it, (indices,), float64.

    With P its entries: tr(W_P [(H^-1)_PP]^-1 W_P^T), which for a single entry is |w|^2 / (H^-1)_jj.

    Args:
        inputs: of the linear.
    """
    inverse_II = inputs.inverse(RIDGE)
    errors = []
    for index in range(inputs.length) if inputs.block > 1 else ():
        at = inputs.entries(index)
        weight_PO = inputs.weight_OI[:, at].T
        errors.append((torch.linalg.solve(inverse_II[at, at], weight_PO) * weight_PO).sum())
    return torch.stack(errors) if errors else inputs.weight_OI.square().sum(0) / inverse_II.diagonal()

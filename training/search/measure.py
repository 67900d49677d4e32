"""Held-out loss of a model and its KL divergence from the dense base: what a cut has lost.

Shape suffixes: N tokens that count, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pat_serve.perplexity import IGNORED_LABEL


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Rows that are not trained on, with the dense model's answers.

    Attributes:
        batches: padded.
        dtype: that the dense model computes in; a model that is compared with it does the same.
        dense: log-probabilities (N, V) of the tokens that count, a tensor for each batch, bfloat16.
    """

    batches: Sequence[dict[str, Tensor]]
    dtype: torch.dtype
    dense: Sequence[Tensor]

    @staticmethod
    def of(dense_model: Any, batches: Sequence[dict[str, Tensor]]) -> HeldOut:
        """Ask the dense model, once.

        Args:
            dense_model: in evaluation mode.
            batches: padded, with labels.
        """
        scores = [_scores(dense_model, batch)[0].to(torch.bfloat16) for batch in batches]
        return HeldOut(batches=batches, dtype=dense_model.dtype, dense=scores)

    @torch.no_grad()
    def losses(self, model: Any) -> tuple[float, float]:
        """Cross-entropy and KL(dense || model), in nats a token; leaves the model in evaluation mode."""
        model.eval()
        loss = kl = tokens = 0.0
        with self.autocast(model):
            for batch, stored_NV in zip(self.batches, self.dense, strict=True):
                model_NV, targets_N = _scores(model, batch)
                # Rounded to bfloat16 the answers no longer sum to one.
                dense_NV = F.log_softmax(stored_NV.float(), dim=-1)
                loss += float(F.nll_loss(model_NV, targets_N, reduction="sum"))
                kl += float(F.kl_div(model_NV, dense_NV, reduction="sum", log_target=True))
                tokens += len(targets_N)
        return loss / tokens, kl / tokens

    def autocast(self, model: Any) -> AbstractContextManager[Any]:
        """Compute in bfloat16 where the dense model does: the model may hold what it trains in float32."""
        bfloat16 = self.dtype == torch.bfloat16
        return torch.autocast(model.device.type, torch.bfloat16) if bfloat16 else nullcontext()


@torch.no_grad()
def _scores(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, V) of the tokens that count, and these tokens (N,)."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels_BT = batch["labels"][:, 1:]
    counted_BT = labels_BT != IGNORED_LABEL
    logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.log_softmax(logits_BTV[counted_BT].float(), dim=-1), labels_BT[counted_BT]

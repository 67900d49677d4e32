"""How far a cut model is from the dense one: KL(dense || cut) of the next token, in nats, over rows of data.

The dense model's states before its head are kept, and not its logits, which are larger by vocabulary over width.

Shape suffixes: N tokens, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pat_serve.training.model.passes import evaluating, run_decoder

# Logits of so many tokens are held at once.
TOKENS_AT_ONCE = 256


class DenseReference:
    """The dense model's answers on some rows.

    Args:
        model: the dense causal language model; it may be changed afterwards.
        rows: padded batches of one or more rows: input_ids and attention_mask.
        head_VD: the dense head's weight, if the model's own is going to change.
    """

    def __init__(self, model: Any, rows: Sequence[dict[str, Tensor]], head_VD: Tensor | None = None) -> None:
        self.rows = rows
        self.head_VD = model.get_output_embeddings().weight if head_VD is None else head_VD
        with torch.no_grad(), evaluating(model, []):
            self.states_ND = [_real(run_decoder(model, row), row) for row in rows]

    @torch.no_grad()
    def distance(self, model: Any, first: int, last: int) -> tuple[float, int]:
        """The sum of KL(dense || model) over the tokens of some rows, in nats, and the number of tokens.

        Args:
            model: a causal language model with the same vocabulary.
            first: number of the first batch of rows.
            last: number of the batch behind the last.
        """
        total, tokens = 0.0, 0
        head = model.get_output_embeddings()
        with evaluating(model, []):
            for row, dense_ND in zip(self.rows[first:last], self.states_ND[first:last], strict=True):
                cut_ND = _real(run_decoder(model, row), row)
                for at in range(0, len(dense_ND), TOKENS_AT_ONCE):
                    part = slice(at, at + TOKENS_AT_ONCE)
                    dense_NV = F.log_softmax((dense_ND[part] @ self.head_VD.T).float(), dim=-1)
                    cut_NV = F.log_softmax(head(cut_ND[part]).float(), dim=-1)
                    total += float(F.kl_div(cut_NV, dense_NV, log_target=True, reduction="sum"))
                tokens += len(dense_ND)
        return total, tokens


def _real(states_BTD: Tensor, row: dict[str, Tensor]) -> Tensor:
    return states_BTD[row["attention_mask"].to(states_BTD.device).bool()]

"""Ask a model the parity prompts, loaded or layer by layer: its answers are logits and greedy continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pat_serve.export.parity.figures import VOCAB_BLOCK, HeldLogits, Logits
from pat_serve.export.parity.layerwise import LayerwiseModel
from pat_serve.export.parity.prompts import Prompts
from pat_serve.terminal.progress import track

Texts = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One model's answers to the parity prompts.

    Attributes:
        logits: logits at every position of the whole prompts.
        continuations: new tokens, by continued prompt; after given texts, the token chosen at each of their places.
            Two texts are compared up to their first difference, and up to there both are the same.
        continued_logits: logits at each new token, (new tokens, vocab) by continued prompt.
    """

    logits: Logits
    continuations: list[list[int]]
    continued_logits: list[Tensor]

    def at(self, positions: Tensor) -> Answers:
        """The same answers with the logits of some positions only."""
        return replace(self, logits=self.logits.at(positions))


@dataclass(frozen=True, kw_only=True)
class WalkedLogits:
    """Logits that a walked model's head computes when asked; `hidden_PD` is what it reads."""

    model: LayerwiseModel
    hidden_PD: Tensor

    @property
    def positions(self) -> int:
        """The number of positions, P."""
        return len(self.hidden_PD)

    @property
    def vocab_size(self) -> int:
        """The size of the model's vocabulary."""
        return self.model.vocab_size

    def block(self, start: int, stop: int) -> Tensor:
        """Compute the logits (P, stop - start) of some tokens."""
        return self.model.head_block(self.hidden_PD, start, stop)

    def at(self, positions: Tensor) -> WalkedLogits:
        """The logits at some of the positions."""
        return replace(self, hidden_PD=self.hidden_PD[positions])


@torch.no_grad()
def answer(model: Any, prompts: Prompts, description: str, texts: Texts | None = None) -> Answers:
    """Ask a causal language model of transformers, loaded as a whole.

    Args:
        model: the model, in eval mode.
        prompts: the prompts to ask.
        description: text of the progress bar.
        texts: continuations to choose each next token after; None generates them, with a cache.
    """
    if hasattr(model, "get_base_model"):
        # The adapter stays inside. Settings of a generation would not reach the model through the wrapper.
        model = model.get_base_model()
    rows = track(prompts.whole, f"parity: {description}", len(prompts.whole))
    # The logits are at least float32, because they are subtracted from each other.
    logits_PV = torch.cat([_widen(model(input_ids=torch.tensor([row])).logits[0]) for row in rows])
    continuations: list[list[int]] = []
    continued_logits: list[Tensor] = []
    if not prompts.continued:
        pass
    elif texts is None:
        continuations, continued_logits = _generate(model, prompts)
    else:
        rows_BT = torch.tensor(_forced(prompts, texts))
        logits_BTV = _widen(model(input_ids=rows_BT, logits_to_keep=prompts.new_tokens).logits)
        continuations, continued_logits = logits_BTV.argmax(-1).tolist(), list(logits_BTV)
    return Answers(
        logits=HeldLogits(values_PV=logits_PV), continuations=continuations, continued_logits=continued_logits
    )


def _generate(model: Any, prompts: Prompts) -> tuple[list[list[int]], list[Tensor]]:
    from transformers import GenerationConfig

    # The file's own generation config may sample, or end a text. The comparison takes the plain argmax, with a cache.
    model.generation_config = GenerationConfig(eos_token_id=None)
    ids_BT = torch.tensor(prompts.continued)
    done = model.generate(
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=prompts.new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return done.sequences[:, ids_BT.shape[1] :].tolist(), list(_widen(torch.stack(done.logits, dim=1)))


def answer_layerwise(model: LayerwiseModel, prompts: Prompts, description: str, texts: Texts | None = None) -> Answers:
    """Ask a model that is walked through.

    Args:
        model: with the source of its weights.
        prompts: the prompts to ask.
        description: text of the progress bar.
        texts: continuations to choose each next token after, in the same pass over the weights; None generates them,
            and every token is one more pass.
    """
    description = f"parity: {description}, layer by layer"
    if texts is not None or not prompts.continued:
        [_] = track([0], description, 1)
        forced = _forced(prompts, texts or [])
        hidden_PD = model.hidden_states(prompts.whole + forced)
        whole = sum(map(len, prompts.whole))
        hidden_BTD = torch.split(hidden_PD[whole:], list(map(len, forced)))
        logits_BTV = [_all_logits(model, hidden_TD[-prompts.new_tokens :]) for hidden_TD in hidden_BTD]
        return Answers(
            logits=WalkedLogits(model=model, hidden_PD=hidden_PD[:whole]),
            continuations=[logits_TV.argmax(-1).tolist() for logits_TV in logits_BTV],
            continued_logits=logits_BTV,
        )
    steps = track(range(1 + prompts.new_tokens), description, 1 + prompts.new_tokens)
    next(steps)
    hidden_PD = model.hidden_states(prompts.whole)
    continuations: list[list[int]] = [[] for _ in prompts.continued]
    logits: list[Tensor] = []
    for _ in steps:
        rows = [prompt + new for prompt, new in zip(prompts.continued, continuations, strict=True)]
        ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        logits_BV = _all_logits(model, model.hidden_states(rows)[ends])
        for new, token in zip(continuations, logits_BV.argmax(-1).tolist(), strict=True):
            new.append(token)
        logits.append(logits_BV)
    return Answers(
        logits=WalkedLogits(model=model, hidden_PD=hidden_PD),
        continuations=continuations,
        continued_logits=list(torch.stack(logits, dim=1)),
    )


def _forced(prompts: Prompts, texts: Texts) -> list[list[int]]:
    """Join the continued prompts with their texts except the last token, whose successor nobody compares."""
    return [[*prompt, *text[:-1]] for prompt, text in zip(prompts.continued, texts, strict=True)]


def answers_bytes(prompts: Sequence[Sequence[int]], vocab_size: int, dtype: torch.dtype) -> int:
    """Compute the memory that the logits of a loaded model take."""
    return sum(map(len, prompts)) * vocab_size * torch.promote_types(dtype, torch.float32).itemsize


def _all_logits(model: LayerwiseModel, hidden_PD: Tensor) -> Tensor:
    starts = range(0, model.vocab_size, VOCAB_BLOCK)
    blocks = [model.head_block(hidden_PD, start, min(start + VOCAB_BLOCK, model.vocab_size)) for start in starts]
    return _widen(torch.cat(blocks, dim=1))


def _widen(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

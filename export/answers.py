"""What a model answers to the parity prompts: logits and greedy continuations, of a loaded model or layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pat_serve.export.figures import VOCAB_BLOCK, HeldLogits, Logits
from pat_serve.export.prompts import Prompts
from pat_serve.layerwise import LayerwiseModel
from pat_serve.progress import track


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One model's answers.

    Attributes:
        logits: at every position of the whole prompts.
        continuations: new tokens, by continued prompt.
        continued_logits: logits at each of them, (new tokens, vocab) by continued prompt.
    """

    logits: Logits
    continuations: list[list[int]]
    continued_logits: list[Tensor]

    def at(self, positions: Tensor) -> Answers:
        """The same with the logits of some positions only."""
        return replace(self, logits=self.logits.at(positions))


@dataclass(frozen=True, kw_only=True)
class WalkedLogits:
    """Logits that a walked model's head computes when asked; `hidden_PD` is what it reads."""

    model: LayerwiseModel
    hidden_PD: Tensor

    @property
    def positions(self) -> int:
        """P."""
        return len(self.hidden_PD)

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self.model.vocab_size

    def block(self, start: int, stop: int) -> Tensor:
        """Logits (P, stop - start) of some tokens."""
        return self.model.head_block(self.hidden_PD, start, stop)

    def at(self, positions: Tensor) -> WalkedLogits:
        """Some of the positions."""
        return replace(self, hidden_PD=self.hidden_PD[positions])


@torch.no_grad()
def answer(model: Any, prompts: Prompts, description: str) -> Answers:
    """Ask a causal language model of transformers, loaded as a whole.

    Args:
        model: in eval mode.
        prompts: what to ask.
        description: for the progress bar.
    """
    from transformers import GenerationConfig

    if hasattr(model, "get_base_model"):
        # The adapter is inside; around it, settings of a generation would not reach the model.
        model = model.get_base_model()
    rows = track(prompts.whole, f"parity: {description}", len(prompts.whole))
    # In float32 at least, where one is to be taken from another.
    logits_PV = torch.cat([_widen(model(input_ids=torch.tensor([row])).logits[0]) for row in rows])
    # The file's own generation config may sample, or end a text; what is compared is the plain argmax, with a cache.
    model.generation_config = GenerationConfig(eos_token_id=None)
    continuations, continued_logits = [], []
    for prompt in track(prompts.continued, f"parity: {description} continues", len(prompts.continued)):
        ids_1T = torch.tensor([prompt])
        done = model.generate(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=prompts.new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        continuations.append(done.sequences[0, len(prompt) :].tolist())
        continued_logits.append(_widen(torch.cat(done.logits)))
    return Answers(
        logits=HeldLogits(values_PV=logits_PV), continuations=continuations, continued_logits=continued_logits
    )


def answer_layerwise(model: LayerwiseModel, prompts: Prompts, description: str) -> Answers:
    """Ask a model that is walked through; every token of a continuation is one more pass over its weights.

    Args:
        model: with the source of its weights.
        prompts: what to ask.
        description: for the progress bar.
    """
    steps = track(range(1 + prompts.new_tokens), f"parity: {description}, layer by layer", 1 + prompts.new_tokens)
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


def answers_bytes(prompts: Sequence[Sequence[int]], vocab_size: int, dtype: torch.dtype) -> int:
    """Memory that the logits of a loaded model take."""
    return sum(map(len, prompts)) * vocab_size * torch.promote_types(dtype, torch.float32).itemsize


def _all_logits(model: LayerwiseModel, hidden_PD: Tensor) -> Tensor:
    starts = range(0, model.vocab_size, VOCAB_BLOCK)
    blocks = [model.head_block(hidden_PD, start, min(start + VOCAB_BLOCK, model.vocab_size)) for start in starts]
    return _widen(torch.cat(blocks, dim=1))


def _widen(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

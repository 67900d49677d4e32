"""The prompts of the parity gate: the run's own, random token ids, and prompts to be continued."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pat_serve.errors import BrokenPlan, first_line
from pat_serve.export.run.reader import Run
from pat_serve.run.folder import PARITY_PROMPTS_FILE

RANDOM_PROMPTS = 4
RANDOM_TOKENS = 32
LONGEST_PROMPT_TOKENS = 256
# These are continued greedily: the first of the run's prompts and the first random one.
CONTINUED_PROMPTS = 3
LONGEST_CONTINUED_TOKENS = 64
NEW_TOKENS = 32
# A CPU without 16-bit arithmetic emulates it, from ten to several hundred times slower than float32.
FEW_TOKENS = 128
FEW_TOKENS_OF_A_PROMPT = 32
# float64 takes twice the time and memory of float32, and is asked only where float32 was furthest off.
WORST_TOKENS = 256
# Every token of a continuation costs a pass over all weights when a model is walked through.
WALKED_NEW_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Token ids for a comparison.

    Attributes:
        whole: prompts whose logits are compared at every position.
        continued: prompts that are continued greedily; all have one length.
        new_tokens: number of new tokens.
    """

    whole: list[list[int]]
    continued: list[list[int]]
    new_tokens: int

    def few(self) -> Part:
        """Take the beginnings of some whole prompts, from both ends in turn: the run's own and random ones."""
        first, last = list(range(len(self.whole))), list(reversed(range(len(self.whole))))
        order = list(dict.fromkeys(number for pair in zip(first, last, strict=True) for number in pair))
        return self._part(order, FEW_TOKENS, FEW_TOKENS_OF_A_PROMPT)

    def worst(self, distance_P: Tensor) -> Part:
        """Take the whole prompts with the largest distance at one of their positions."""
        largest = [float(part.max()) for part in torch.split(distance_P, list(map(len, self.whole)))]
        order = sorted(range(len(self.whole)), key=lambda number: -largest[number])
        return self._part(order, WORST_TOKENS, LONGEST_PROMPT_TOKENS)

    def _part(self, order: list[int], tokens: int, tokens_of_a_prompt: int) -> Part:
        """Take the first prompt of an order, and every later one that does not exceed the number of tokens."""
        chosen: dict[int, int] = {}
        for number in order:
            length = min(len(self.whole[number]), tokens_of_a_prompt)
            if not chosen or sum(chosen.values()) + length <= tokens:
                chosen[number] = length
        starts = [0, *torch.tensor([len(prompt) for prompt in self.whole]).cumsum(0).tolist()]
        numbers = sorted(chosen)
        return Part(
            prompts=Prompts(whole=[self.whole[at][: chosen[at]] for at in numbers], continued=[], new_tokens=0),
            positions=torch.cat([torch.arange(starts[at], starts[at] + chosen[at]) for at in numbers]),
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """Beginnings of some whole prompts: causal attention gives their positions the logits that they have in all.

    Attributes:
        prompts: without any to continue.
        positions: where their tokens stand among those of all prompts.
    """

    prompts: Prompts
    positions: Tensor


def parity_prompts(run: Run, *, new_tokens: int = NEW_TOKENS) -> Prompts:
    """The run's own first examples, and seeded random token ids, which reach embeddings that the data does not.

    Raises:
        BrokenPlan: the run has lost its examples, or they are not token ids of its base.
    """
    own = _own_prompts(run)
    vocab = run.base.sizes.vocab
    # vLLM refuses what is longer than the model's positions; a prompt and its continuation must fit.
    longest = int(run.base.config.get("max_position_embeddings") or LONGEST_PROMPT_TOKENS + NEW_TOKENS) - NEW_TOKENS
    longest = max(1, longest)
    generator = torch.Generator().manual_seed(0)
    random: list[list[int]] = torch.randint(vocab, (RANDOM_PROMPTS, RANDOM_TOKENS), generator=generator).tolist()
    continued = [*own[: CONTINUED_PROMPTS - 1], *random[: max(1, CONTINUED_PROMPTS - len(own))]]
    # All are as long as the shortest, so the batch has no padding.
    shortest = min(LONGEST_CONTINUED_TOKENS, longest, *map(len, continued))
    return Prompts(
        whole=[prompt[: min(LONGEST_PROMPT_TOKENS, longest)] for prompt in own + random],
        continued=[prompt[:shortest] for prompt in continued],
        new_tokens=new_tokens,
    )


def own_prompts(run: Run) -> list[list[int]]:
    """List the whole prompts that are the run's own, without the random ones."""
    return parity_prompts(run).whole[:-RANDOM_PROMPTS]


def _own_prompts(run: Run) -> list[list[int]]:
    path = run.folder / PARITY_PROMPTS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["token_ids"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(path, first_line(error)) from error
    vocab = run.base.sizes.vocab
    for number, prompt in enumerate(prompts, 1):
        legal = isinstance(prompt, list) and all(type(token) is int and 0 <= token < vocab for token in prompt)
        if not legal or not prompt:
            raise _broken(path, f"in line {number} something else than a list of token ids below {vocab}")
    if not prompts:
        raise _broken(path, "none")
    return prompts


def _broken(path: Any, found: str) -> BrokenPlan:
    return BrokenPlan(path, expected="the run's prompts", found=found, fix="Copy the run again.")

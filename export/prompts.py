"""What parity is measured on: the run's own prompts, random token ids, and prompts to be continued."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch

from pat_serve.errors import BrokenPlan, first_line
from pat_serve.export.reader import Run
from pat_serve.run_folder import PARITY_PROMPTS_FILE

RANDOM_PROMPTS = 4
RANDOM_TOKENS = 32
LONGEST_PROMPT_TOKENS = 256
# Continued greedily: the first of the run's prompts and the first random one.
CONTINUED_PROMPTS = 3
LONGEST_CONTINUED_TOKENS = 64
NEW_TOKENS = 32
# A CPU without 16-bit arithmetic emulates it, up to several hundred times slower than float32.
FEW_TOKENS = 512
# Every token of a continuation costs a pass over all weights when a model is walked through.
WALKED_NEW_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Token ids for a comparison.

    Attributes:
        whole: logits are compared at every position of these.
        continued: these are continued greedily.
        new_tokens: by so many tokens.
    """

    whole: list[list[int]]
    continued: list[list[int]]
    new_tokens: int

    def few(self) -> list[int]:
        """Numbers of some whole prompts, from both ends alternately (the run's own and random ones), ascending."""
        first, last = list(range(len(self.whole))), list(reversed(range(len(self.whole))))
        chosen: list[int] = []
        for number in (number for pair in zip(first, last, strict=True) for number in pair):
            tokens = sum(len(self.whole[at]) for at in {*chosen, number})
            if number not in chosen and (not chosen or tokens <= FEW_TOKENS):
                chosen.append(number)
        return sorted(chosen)

    def select(self, numbers: list[int]) -> Prompts:
        """Some of the whole prompts, with all continued ones."""
        return replace(self, whole=[self.whole[at] for at in numbers])

    def positions_of(self, numbers: list[int]) -> torch.Tensor:
        """Where the tokens of some whole prompts stand among those of all."""
        ends = torch.tensor([len(prompt) for prompt in self.whole]).cumsum(0).tolist()
        return torch.cat([torch.arange(ends[at] - len(self.whole[at]), ends[at]) for at in numbers])


def parity_prompts(run: Run, *, new_tokens: int = NEW_TOKENS) -> Prompts:
    """The run's own first examples, and seeded random token ids, which reach embeddings that the data does not.

    Raises:
        BrokenPlan: the run has lost its examples, or they are not token ids of its base.
    """
    own = _own_prompts(run)
    vocab = int(run.base.config["vocab_size"])
    # vLLM refuses what is longer than the model's positions; a prompt and its continuation must fit.
    longest = int(run.base.config.get("max_position_embeddings") or LONGEST_PROMPT_TOKENS + NEW_TOKENS) - NEW_TOKENS
    longest = max(1, longest)
    generator = torch.Generator().manual_seed(0)
    random: list[list[int]] = torch.randint(vocab, (RANDOM_PROMPTS, RANDOM_TOKENS), generator=generator).tolist()
    continued = [*own[: CONTINUED_PROMPTS - 1], *random[: max(1, CONTINUED_PROMPTS - len(own))]]
    return Prompts(
        whole=[prompt[: min(LONGEST_PROMPT_TOKENS, longest)] for prompt in own + random],
        continued=[prompt[: min(LONGEST_CONTINUED_TOKENS, longest)] for prompt in continued],
        new_tokens=new_tokens,
    )


def own_prompts(run: Run) -> list[list[int]]:
    """The whole prompts that are the run's own, without the random ones."""
    return parity_prompts(run).whole[:-RANDOM_PROMPTS]


def _own_prompts(run: Run) -> list[list[int]]:
    path = run.folder / PARITY_PROMPTS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["token_ids"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(path, first_line(error)) from error
    vocab = int(run.base.config["vocab_size"])
    for number, prompt in enumerate(prompts, 1):
        legal = isinstance(prompt, list) and all(type(token) is int and 0 <= token < vocab for token in prompt)
        if not legal or not prompt:
            raise _broken(path, f"in line {number} something else than a list of token ids below {vocab}")
    if not prompts:
        raise _broken(path, "none")
    return prompts


def _broken(path: Any, found: str) -> BrokenPlan:
    return BrokenPlan(path, expected="the run's prompts", found=found, fix="Copy the run again.")

"""Scores of token ids by another runtime. `server` returns them in this form, and the caller compares them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

# vLLM lists so many log-probabilities by default, and refuses more unless its engine was told otherwise.
LISTED_TOKENS = 20


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ListedScores(_Message):
    """The likeliest next tokens at each position of one prompt, by a runtime.

    Attributes:
        token_ids: for each position but the last, the likeliest next token first, then others in any order.
        logprobs: their log-probabilities in nats.
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]


class Scores(_Message):
    """A runtime's answers to a `ScoreRequest`.

    Attributes:
        prompts: scores of whole prompts.
        continuations: greedily generated tokens, by continued prompt.
    """

    prompts: list[ListedScores]
    continuations: list[list[int]]


class ScoreRequest(_Message):
    """A request to a runtime: prompts to score, and prompts to continue.

    Attributes:
        model: folder with config.json and weights.
        dtype: to compute in: float32, bfloat16 or float16.
        prompts: token ids to score at every position.
        continued: token ids to continue greedily.
        new_tokens: number of tokens of each continuation.
    """

    model: Path
    dtype: str
    prompts: list[list[int]]
    continued: list[list[int]]
    new_tokens: int


Scorer = Callable[[ScoreRequest], Scores]

"""What another runtime says about token ids: the form in which `server` hands it to whoever compares it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

# vLLM lists so many by default, and refuses more unless its engine was told otherwise.
LISTED_TOKENS = 20


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ListedScores(_Message):
    """A runtime's judgement of one prompt.

    Attributes:
        token_ids: for each position but the last, the likeliest next token first, then others in any order.
        logprobs: their log-probabilities in nats.
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]


class Scores(_Message):
    """A runtime's answers.

    Attributes:
        prompts: judgements of whole prompts.
        continuations: greedily generated tokens, by continued prompt.
    """

    prompts: list[ListedScores]
    continuations: list[list[int]]


class ScoreRequest(_Message):
    """What a runtime is asked.

    Attributes:
        model: folder with config.json and weights.
        dtype: to compute in: float32, bfloat16 or float16.
        prompts: token ids that are to be judged at every position.
        continued: token ids that are to be continued greedily.
        new_tokens: by exactly so many tokens.
    """

    model: Path
    dtype: str
    prompts: list[list[int]]
    continued: list[list[int]]
    new_tokens: int


Scorer = Callable[[ScoreRequest], Scores]

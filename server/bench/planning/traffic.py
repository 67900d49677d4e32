"""The requests of users: lengths of prompts and answers, and times of arrival. Pure mathematics, seeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request that arrives.

    Attributes:
        at_s: time of the arrival.
        prompt_tokens: tokens of its prompt.
        output_tokens: tokens that it generates.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that the request holds in the KV cache at its end."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The kinds of requests.

    Attributes:
        prompt_tokens: of each kind.
        output_tokens: of each kind.
        weights: share of each kind; they sum to 1.
    """

    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def mean_output_tokens(self) -> float:
        """Mean output tokens of a request."""
        return sum(tokens * weight for tokens, weight in zip(self.output_tokens, self.weights, strict=True))

    @property
    def prompt_range(self) -> tuple[int, int]:
        """The shortest prompt and the longest."""
        return min(self.prompt_tokens), max(self.prompt_tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(prompt + output for prompt, output in zip(self.prompt_tokens, self.output_tokens, strict=True))

    @property
    def decodes(self) -> bool:
        """Whether any request has a second token."""
        return max(self.output_tokens) > 1


def crossed(prompts: Sequence[tuple[int, float]], outputs: Sequence[tuple[int, float]]) -> Mix:
    """Prompts and outputs drawn independently, each from (tokens, weight); weights need not sum to 1."""
    all_prompts, all_outputs = sum(weight for _, weight in prompts), sum(weight for _, weight in outputs)
    kinds = [
        (prompt, output, first / all_prompts * second / all_outputs)
        for prompt, first in prompts
        for output, second in outputs
    ]
    return Mix(
        prompt_tokens=tuple(prompt for prompt, _, _ in kinds),
        output_tokens=tuple(output for _, output, _ in kinds),
        weights=tuple(weight for _, _, weight in kinds),
    )


def poisson(mix: Mix, *, rate_per_s: float, requests: int, seed: int) -> list[Arrival]:
    """Poisson arrivals of a mix.

    Gaps and kinds are drawn from two separate streams, so with the same seed another rate has the same requests, only
    denser.

    Args:
        mix: the kinds.
        rate_per_s: requests a second, above 0.
        requests: number of them.
        seed: the same one gives the same arrivals.
    """
    gaps, kinds = np.random.default_rng((seed, 0)), np.random.default_rng((seed, 1))
    times = np.cumsum(gaps.exponential(1.0, size=requests)) / rate_per_s
    picks = kinds.choice(len(mix.weights), size=requests, p=np.asarray(mix.weights) / sum(mix.weights))
    return [
        Arrival(at_s=float(at_s), prompt_tokens=mix.prompt_tokens[pick], output_tokens=mix.output_tokens[pick])
        for at_s, pick in zip(times, picks, strict=True)
    ]

"""Raw timestamps of one batch, and the latencies derived from them. Pure mathematics."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from pat_serve.server.analysis.statistics import percentile


@dataclass(frozen=True, kw_only=True)
class BatchTrace:
    """When each step of a batch ran, on the machine's monotonic clock (the same one in all its processes).

    Attributes:
        batch_size: requests, all submitted at once.
        submitted_s: just before they were submitted.
        steps_started_s: start of each engine step; between two steps another engine may have had the machine.
        steps_ended_s: end of each engine step.
        steps_tokens: new tokens that each step gave, over all requests.
        first_token_step: index of the step that gave the last of the requests its first token.
        prompts_sha256: digest of the prompts' token ids as the engine reports them.
    """

    batch_size: int
    submitted_s: float
    steps_started_s: tuple[float, ...]
    steps_ended_s: tuple[float, ...]
    steps_tokens: tuple[int, ...]
    first_token_step: int
    prompts_sha256: str

    @property
    def ttft_s(self) -> float:
        """Seconds from submission until every request has its first token: the batch's prefill."""
        return self.steps_ended_s[self.first_token_step] - self.submitted_s

    @property
    def decode_steps_s(self) -> tuple[float, ...]:
        """Seconds of each pure decode step: one token for every request, none still in prefill.

        Steps rather than (T(1 + n) - T(1)) / n: the difference of two whole runs carries the noise of two prefills,
        each as long as many decode steps; and only steps can be interleaved with those of another engine.
        """
        return tuple(
            self.steps_ended_s[i] - self.steps_started_s[i]
            for i in range(self.first_token_step + 1, len(self.steps_ended_s))
            if self.steps_tokens[i] == self.batch_size
        )

    @property
    def tpot_s(self) -> float:
        """Seconds per output token after the first, as each request sees it: the median decode step.

        The median, because a step that another process disturbed belongs to neither model; the KV cache grows by one
        token a step, so the middle step is also the one at the mean context.

        Raises:
            ValueError: no pure decode step in this trace.
        """
        return percentile(self.decode_steps_s, 50)

    @property
    def e2e_s(self) -> float:
        """Seconds from submission until the last token. Meaningless where another engine had turns meanwhile."""
        return self.steps_ended_s[-1] - self.submitted_s


@dataclass(frozen=True, kw_only=True)
class RequestTrace:
    """When one request got its tokens, on the machine's monotonic clock.

    Attributes:
        submitted_s: when the engine was given it.
        tokens_s: the end of the step that gave each token.
    """

    submitted_s: float
    tokens_s: tuple[float, ...]


def prompts_digest(prompts: Sequence[Sequence[int]]) -> str:
    """SHA-256 of token ids: numbers joined by blanks, prompts by line feeds."""
    text = "\n".join(" ".join(map(str, prompt)) for prompt in prompts)
    return hashlib.sha256(text.encode()).hexdigest()

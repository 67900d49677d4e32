"""Raw timestamps of one batch, and the latencies derived from them. Pure mathematics."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from pat_serve.server.analysis.statistics import percentile


@dataclass(frozen=True, kw_only=True)
class BatchTrace:
    """The times of a batch's steps, on the machine's monotonic clock, which is the same in all its processes.

    Attributes:
        batch_size: requests, all submitted at once.
        submitted_s: time just before the requests were submitted.
        steps_started_s: start of each engine step; between two steps another engine may have had the machine.
        steps_ended_s: end of each engine step.
        steps_tokens: new tokens that each step gave, over all requests.
        first_token_step: index of the step that gave the last of the requests its first token.
        prompts_sha256: digest of the prompts' token ids as the engine reports them.
        prompt_tokens: of each request; None in records that are older than grids of prompts.
    """

    batch_size: int
    submitted_s: float
    steps_started_s: tuple[float, ...]
    steps_ended_s: tuple[float, ...]
    steps_tokens: tuple[int, ...]
    first_token_step: int
    prompts_sha256: str
    prompt_tokens: int | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds from submission until every request has its first token: the batch's prefill."""
        return self.steps_ended_s[self.first_token_step] - self.submitted_s

    @property
    def decode_steps_s(self) -> tuple[float, ...]:
        """Seconds of each pure decode step: one token for every request, none still in prefill.

        The difference of two whole runs, (T(1 + n) - T(1)) / n, would not do: it carries the noise of two prefills,
        each as long as many decode steps. And only steps can be interleaved with those of another engine.
        """
        return tuple(
            self.steps_ended_s[i] - self.steps_started_s[i]
            for i in range(self.first_token_step + 1, len(self.steps_ended_s))
            if self.steps_tokens[i] == self.batch_size
        )

    @property
    def tpot_s(self) -> float:
        """Seconds per output token after the first, as each request sees it: the median decode step.

        The median leaves out steps that another process disturbed, which belong to neither model. The KV cache grows by
        one token a step, so the middle step is also the one at the mean context.

        Raises:
            ValueError: no pure decode step in this trace.
        """
        return percentile(self.decode_steps_s, 50)

    @property
    def e2e_s(self) -> float:
        """Seconds from submission until the last token; they mean nothing where another engine had turns meanwhile."""
        return self.steps_ended_s[-1] - self.submitted_s


@dataclass(frozen=True, kw_only=True)
class RequestTrace:
    """The times of one request's tokens, on the machine's monotonic clock.

    Attributes:
        submitted_s: time at which the engine was given the request.
        tokens_s: the end of the step that gave each token.
    """

    submitted_s: float
    tokens_s: tuple[float, ...]


def prompts_digest(prompts: Sequence[Sequence[int]]) -> str:
    """SHA-256 of token ids: numbers joined by blanks, prompts by line feeds."""
    text = "\n".join(" ".join(map(str, prompt)) for prompt in prompts)
    return hashlib.sha256(text.encode()).hexdigest()

"""The moment at which an engine's tokens arrive, and the caller to whom each of them belongs.

Moment and caller are seen where vLLM's client takes in the output of its engine. Nearer to the caller they cannot be
seen on all of vLLM's routes: an answer that is not a stream leaves as a whole, and the events of a stream hold any
number of tokens, or none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True, slots=True)
class RequestWork:
    """The work of an engine for one caller so far. Times are on the monotonic clock, in seconds.

    Attributes:
        prompt_tokens: tokens of the prompts that the engine was given.
        output_tokens: tokens that it has made, over all sequences.
        first_token_s: when the first token of any of the sequences arrived.
        queue_s: how long the first sequence to be scheduled had waited in the engine; None without its statistics.
        decode_s: over all sequences, from the first token to the last.
        decoded_tokens: over all sequences, the tokens after the first.
        open_sequences: the sequences that the engine works on, by id, each with a function that ends its watch.
        closed: nothing of what the engine does from now on belongs to this caller.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token_s: float | None = None
    queue_s: float | None = None
    decode_s: float = 0.0
    decoded_tokens: int = 0
    open_sequences: dict[str, Callable[[str], None]] = field(default_factory=dict)
    closed: bool = False

    def close(self) -> None:
        """End the count for this caller, who has an answer or has left."""
        self.closed = True
        # An engine may have dropped some sequences without a word.
        for request_id, end in tuple(self.open_sequences.items()):
            end(request_id)

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after a sequence's first; None without any."""
        return self.decode_s / self.decoded_tokens if self.decoded_tokens else None


# The work for the caller whom the current task answers. All tasks that it starts inherit it: vLLM's know no caller.
current_work: ContextVar[RequestWork | None] = ContextVar("pat_serve_request_work", default=None)


@dataclass(kw_only=True, slots=True)
class _Sequence:
    work: RequestWork
    first_token_s: float | None = None
    last_token_s: float = 0.0


class TokenWatch:
    """Follows one engine's tokens. Lives on the event loop.

    Args:
        states: vLLM's own record of its requests by id, which holds their statistics.
    """

    def __init__(self, states: Mapping[str, Any]) -> None:
        self._states = states
        self._sequences: dict[str, _Sequence] = {}
        # The last token of any request, whichever route it came by, on the monotonic clock.
        self.last_token_s: float | None = None

    def __len__(self) -> int:
        """Number of sequences that are followed."""
        return len(self._sequences)

    def add(self, request_id: str, prompt_tokens: int) -> None:
        """Follow a sequence that the current caller gives to the engine."""
        work = current_work.get()
        if work is None or work.closed or request_id in self._sequences:
            return
        work.prompt_tokens += prompt_tokens
        work.open_sequences[request_id] = self.end
        self._sequences[request_id] = _Sequence(work=work)

    def process(self, process: Callable[..., Any], outputs: Sequence[Any], *more: Any, **options: Any) -> Any:
        """Have vLLM process a step's outputs, and note what they say.

        Args:
            process: vLLM's own method; it cuts tokens behind a stop string off the outputs.
            outputs: `request_id`, `new_token_ids` and `finish_reason` each.
            more: further arguments of `process`.
            options: further arguments of `process`.
        """
        now_s = time.monotonic()
        if any(output.new_token_ids for output in outputs):
            self.last_token_s = now_s
        followed = [(output, self._sequences.get(output.request_id)) for output in outputs]
        # A sequence that ends with this step is gone from vLLM's record afterwards.
        states = {
            output.request_id: self._states.get(output.request_id)
            for output, sequence in followed
            if sequence is not None and sequence.first_token_s is None
        }
        result = process(outputs, *more, **options)
        for output, sequence in followed:
            if sequence is None:
                continue
            if output.new_token_ids:
                _note(sequence, len(output.new_token_ids), now_s, states.get(output.request_id))
            if output.finish_reason is not None:
                self.end(output.request_id)
        return result

    def end(self, request_id: str) -> None:
        """End the watch on a sequence; harmless where there is none."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        sequence.work.open_sequences.pop(request_id, None)
        if sequence.first_token_s is not None:
            sequence.work.decode_s += sequence.last_token_s - sequence.first_token_s


def _note(sequence: _Sequence, tokens: int, now_s: float, state: Any) -> None:
    work = sequence.work
    work.output_tokens += tokens
    sequence.last_token_s = now_s
    if sequence.first_token_s is not None:
        work.decoded_tokens += tokens
        return
    sequence.first_token_s = now_s
    if work.first_token_s is None:
        work.first_token_s = now_s
    # There are no statistics with --disable-log-stats.
    stats = getattr(state, "stats", None)
    if stats is not None and stats.scheduled_ts:
        waited_s = stats.scheduled_ts - stats.queued_ts
        work.queue_s = waited_s if work.queue_s is None else min(work.queue_s, waited_s)

"""Which tokens belong to which HTTP request, seen where the engine's output arrives.

Nearer to the client it cannot be seen for all of vLLM's routes: an answer that is not a stream leaves as a whole, and
events of a stream hold any number of tokens, or none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pat_serve.server.http.exchange import Exchange, current


@dataclass(kw_only=True, slots=True)
class _Sequence:
    exchange: Exchange
    first_token_s: float | None = None
    last_token_s: float = 0.0


class SequenceWatch:
    """Follows the sequences of requests that are under way. Lives on the event loop.

    Args:
        states: vLLM's own record of its requests by id, for their statistics.
    """

    def __init__(self, states: Mapping[str, Any]) -> None:
        self._states = states
        self._sequences: dict[str, _Sequence] = {}

    def __len__(self) -> int:
        """Number of sequences that are followed."""
        return len(self._sequences)

    def add(self, request_id: str, prompt_tokens: int) -> None:
        """Follow a sequence that the current HTTP request gives to the engine."""
        exchange = current.get()
        if exchange is None or exchange.closed or request_id in self._sequences:
            return
        exchange.prompt_tokens += prompt_tokens
        exchange.open_sequences[request_id] = self.end
        self._sequences[request_id] = _Sequence(exchange=exchange)

    def process(self, process: Callable[..., Any], outputs: Sequence[Any], *more: Any, **options: Any) -> Any:
        """Have vLLM process a step's outputs, and note what they say.

        Args:
            process: vLLM's own method; it cuts tokens behind a stop string off the outputs.
            outputs: `request_id`, `new_token_ids` and `finish_reason` each.
            more: further arguments of `process`.
            options: further arguments of `process`.
        """
        now_s = time.monotonic()
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
        """Follow a sequence no longer, if it still is."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        sequence.exchange.open_sequences.pop(request_id, None)
        if sequence.first_token_s is not None:
            sequence.exchange.decode_s += sequence.last_token_s - sequence.first_token_s


def watch(processor: Any) -> None:
    """Follow the sequences of an engine.

    Args:
        processor: its vLLM OutputProcessor, two methods of which are wrapped.
    """
    sequences = SequenceWatch(processor.request_states)
    process_outputs, add_request = processor.process_outputs, processor.add_request

    def watch_and_process(outputs: Any, *more: Any, **options: Any) -> Any:
        return sequences.process(process_outputs, outputs, *more, **options)

    def watch_and_add(
        request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None
    ) -> None:
        # The n sequences of one request share its prompt.
        prompt_tokens = 0 if request_index else len(request.prompt_token_ids or ())
        sequences.add(request.request_id, prompt_tokens)
        add_request(request, prompt, parent_req, request_index, queue)

    processor.process_outputs = watch_and_process
    processor.add_request = watch_and_add


def _note(sequence: _Sequence, tokens: int, now_s: float, state: Any) -> None:
    exchange = sequence.exchange
    exchange.output_tokens += tokens
    sequence.last_token_s = now_s
    if sequence.first_token_s is not None:
        exchange.decoded_tokens += tokens
        return
    sequence.first_token_s = now_s
    if exchange.first_token_s is None:
        exchange.first_token_s = now_s
    # None with --disable-log-stats.
    stats = getattr(state, "stats", None)
    if stats is not None and stats.scheduled_ts:
        waited_s = stats.scheduled_ts - stats.queued_ts
        exchange.queue_s = waited_s if exchange.queue_s is None else min(exchange.queue_s, waited_s)

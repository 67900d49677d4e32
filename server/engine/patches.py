"""All changes to vLLM while it runs: the server wraps vLLM's functions here and nowhere else.

The guard of token ids itself stands in `pat_serve/tokens/vocabulary_guard.py`, because `pat-eval` puts the same guard
before its own engines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from pat_serve.server.engine.errors import EngineDead, EngineFault, GenerationFailed
from pat_serve.server.engine.token_watch import TokenWatch
from pat_serve.tokens.vocabulary import Vocabulary
from pat_serve.tokens.vocabulary_guard import guard


def guard_vocabulary(client: Any, rows: int) -> Vocabulary:
    """Have a client refuse token ids beyond its model's vocabulary.

    Args:
        client: vLLM's AsyncLLM.
        rows: of the model's embedding.

    Returns:
        the vocabulary.
    """
    from vllm.exceptions import VLLMValidationError

    tokenizer = client.renderer.tokenizer
    vocabulary = Vocabulary(rows=rows, rowless={}) if tokenizer is None else Vocabulary.of(tokenizer, rows)
    # Some ids of a multimodal model are no rows: they stand for images and sounds that are put in their place.
    if not client.model_config.is_multimodal_model:
        guard(client, vocabulary, VLLMValidationError)
    return vocabulary


def watch_outputs(processor: Any) -> TokenWatch:
    """Follow the tokens of an engine.

    Args:
        processor: the vLLM OutputProcessor of the engine's client; two of its methods are wrapped.
    """
    watch = TokenWatch(processor.request_states)
    process_outputs, add_request = processor.process_outputs, processor.add_request

    def watch_and_process(outputs: Any, *more: Any, **options: Any) -> Any:
        return watch.process(process_outputs, outputs, *more, **options)

    def watch_and_add(
        request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None
    ) -> None:
        # The n sequences of one request share its prompt.
        prompt_tokens = 0 if request_index else len(request.prompt_token_ids or ())
        watch.add(request.request_id, prompt_tokens)
        add_request(request, prompt, parent_req, request_index, queue)

    processor.process_outputs = watch_and_process
    processor.add_request = watch_and_add
    return watch


def replace_shutdown(client: Any, shutdown: Callable[[Callable[..., None], float | None], None]) -> None:
    """Put a function in the place of a client's shutdown.

    Args:
        client: vLLM's AsyncLLM.
        shutdown: takes vLLM's own shutdown and the timeout in seconds that vLLM gives.
    """
    vllms = client.shutdown

    def ours(timeout: float | None = None) -> None:
        shutdown(vllms, timeout)

    client.shutdown = ours


def engine_faults() -> dict[type[Exception], Callable[[], EngineFault]]:
    """The errors of vLLM's engine that its routes let through, each with the fault that it means."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    return {EngineDeadError: EngineDead, EngineGenerateError: GenerationFailed}


def let_engine_errors_through() -> None:
    """Have vLLM's /v1/messages leave the engine's errors to the handlers of the app.

    vLLM's other routes do so by themselves. The routes under /v1/messages catch every error, and log it with its
    traceback.
    """
    from vllm.entrypoints.anthropic import api_router

    faults = tuple(engine_faults())
    explain = api_router.create_error_response

    def explain_or_pass(error: Exception) -> Any:
        if isinstance(error, faults):
            raise error
        return explain(error)

    api_router.create_error_response = explain_or_pass

    def is_no_clients_mistake(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, Exception) or isinstance(error, faults):
            return True
        return bool(explain(error).error.code >= HTTPStatus.INTERNAL_SERVER_ERROR)

    logging.getLogger(api_router.__name__).addFilter(is_no_clients_mistake)


def bound_message_queues(max_chunk_bytes: int) -> None:
    """Bound the chunks of the queues that this process makes from now on. A queue has ten chunks.

    Args:
        max_chunk_bytes: size of a chunk at most.
    """
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer

    make = ShmRingBuffer.__init__

    def make_bounded(
        self: Any, n_reader: int, chunk_bytes: int, max_chunks: int, name: str | None = None, **others: Any
    ) -> None:
        # A queue that another process has made, and that is opened by name, keeps its size.
        make(self, n_reader, chunk_bytes if name else min(chunk_bytes, max_chunk_bytes), max_chunks, name, **others)

    ShmRingBuffer.__init__ = make_bounded

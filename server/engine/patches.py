"""Everything that is changed of vLLM while it runs: its methods are wrapped here and nowhere else in the server.

`pat_serve/tokens/vocabulary_guard.py` holds what the guard of token ids does, because `pat-eval` puts the same guard
before its own engines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from pat_serve.server.engine.failures import engine_dead, generation_failed
from pat_serve.server.http.errors import HttpError, shape_vllm_errors
from pat_serve.tokens.vocabulary import Vocabulary
from pat_serve.tokens.vocabulary_guard import guard


def guard_vocabulary(client: Any, rows: int) -> Vocabulary:
    """The vocabulary of a client's model, ids beyond which it refuses from now on."""
    from vllm.exceptions import VLLMValidationError

    tokenizer = client.renderer.tokenizer
    vocabulary = Vocabulary(rows=rows, rowless={}) if tokenizer is None else Vocabulary.of(tokenizer, rows)
    # Of a multimodal one some ids are no rows and stand for what is put in their place.
    if not client.model_config.is_multimodal_model:
        guard(client, vocabulary, VLLMValidationError)
    return vocabulary


def vllm_failures() -> dict[type[Exception], Callable[[], HttpError]]:
    """What vLLM's own routes are to answer for its engine's errors, in place of 500 with the exception's text."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    return {EngineDeadError: engine_dead, EngineGenerateError: generation_failed}


def shape_failures(app: FastAPI) -> None:
    """Have all of vLLM's routes answer for its engine as ours do.

    Those of /v1/messages catch every error themselves; from now on they leave the engine's to the app's handlers.

    Args:
        app: vLLM's, with its handlers.
    """
    from vllm.entrypoints.anthropic import api_router

    failures = vllm_failures()
    explain = api_router.create_error_response

    def explain_or_pass(error: Exception) -> Any:
        if isinstance(error, tuple(failures)):
            raise error
        return explain(error)

    api_router.create_error_response = explain_or_pass

    def is_no_clients_mistake(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, Exception) or isinstance(error, tuple(failures)):
            return True
        return bool(explain(error).error.code >= HTTPStatus.INTERNAL_SERVER_ERROR)

    # They log every error with its traceback, a client's too.
    logging.getLogger(api_router.__name__).addFilter(is_no_clients_mistake)
    shape_vllm_errors(app, failures)


def bound_message_queues(max_chunk_bytes: int) -> None:
    """Give the queues that this process makes from now on chunks of at most so many bytes; there are ten to a queue."""
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer

    make = ShmRingBuffer.__init__

    def make_bounded(
        self: Any, n_reader: int, chunk_bytes: int, max_chunks: int, name: str | None = None, **others: Any
    ) -> None:
        # A queue that another process has made, and that is opened by name, keeps its size.
        make(self, n_reader, chunk_bytes if name else min(chunk_bytes, max_chunk_bytes), max_chunks, name, **others)

    ShmRingBuffer.__init__ = make_bounded

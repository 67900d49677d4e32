"""`POST /generate` turns a checked body into a text, or into a stream of events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from uuid import uuid4

from fastapi import Request, Response
from pydantic import BaseModel

from pat_serve.server.engine.errors import EngineFault
from pat_serve.server.engine.generation import Piece, RequestTimes, Sampling, TimedGeneration
from pat_serve.server.engine.online import Engine
from pat_serve.server.http.connection import EventStream, while_connected
from pat_serve.server.http.errors import InvalidRequestError, answer_to
from pat_serve.server.http.limits import LimitError, check_vocabulary, output_budget
from pat_serve.server.routes.schemas import GenerateRequest, GenerateResponse, StreamDelta, StreamEnd, Timings, Usage


class Answer:
    """One generation under way, with its texts and tokens so far."""

    def __init__(self, engine: Engine, prompt: list[int], sampling: Sampling, arrival_s: float) -> None:
        self.id = f"gen-{uuid4().hex}"
        self._generation = TimedGeneration(engine, prompt, sampling, arrival_s=arrival_s)
        self._prompt_tokens = len(prompt)
        self.texts: list[str] = []
        self.token_ids: list[int] = []

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The generation's pieces, recorded as they pass."""
        async with aclosing(self._generation.pieces()) as pieces:
            async for piece in pieces:
                self.texts.append(piece.text)
                self.token_ids += piece.token_ids
                yield piece

    def end(self) -> StreamEnd:
        """Finish reason, usage and timings, once the pieces are through."""
        usage = Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(self.token_ids),
            total_tokens=self._prompt_tokens + len(self.token_ids),
        )
        # An engine that is shut down under a request ends it without a reason.
        reason = self._generation.finish_reason or "abort"
        return StreamEnd(id=self.id, finish_reason=reason, usage=usage, timings=timings(self._generation.times()))


def timings(times: RequestTimes) -> Timings:
    """The latencies of a request, as they go over HTTP."""
    return Timings(queue_s=times.queue_s, ttft_s=times.ttft_s, tpot_s=times.tpot_s, e2e_s=times.e2e_s)


async def generate(engine: Engine, body: GenerateRequest, http: Request) -> Response:
    """Answer one request.

    Raises:
        InvalidRequestError: the request does not fit the model.
        EngineFault: the engine refuses the request, or fails before the first token.
        ClientGoneError: the client left; the engine has stopped working on its request.
    """
    arrival_s = time.monotonic()
    prompt, sampling = await _plan(engine, body)
    answer = Answer(engine, prompt, sampling, arrival_s)
    if not body.stream:
        return await while_connected(http, _whole(answer, engine.model_name))
    pieces = answer.pieces()
    # The status line promises success, so it waits for the first token: a full queue is still a 503.
    first = await while_connected(http, anext(pieces))
    return EventStream(_events(answer, first, pieces))


async def _plan(engine: Engine, body: GenerateRequest) -> tuple[list[int], Sampling]:
    try:
        if body.prompt is not None:
            prompt, param = await engine.tokenize(body.prompt), "prompt"
        elif body.messages is not None:
            prompt, param = await engine.render([message.model_dump() for message in body.messages]), "messages"
        else:
            assert body.prompt_token_ids is not None
            prompt, param = body.prompt_token_ids, "prompt_token_ids"
        max_tokens = output_budget(len(prompt), body.max_tokens, max_model_len=engine.max_model_len, param=param)
        check_vocabulary(prompt, vocab_size=engine.vocab_size, param=param)
    except LimitError as error:
        raise InvalidRequestError(str(error), error.param) from error
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=tuple(body.stop),
        seed=body.seed,
        ignore_eos=body.ignore_eos,
    )
    return prompt, sampling


async def _whole(answer: Answer, model_name: str) -> Response:
    async for _ in answer.pieces():
        pass
    end = answer.end()
    whole = GenerateResponse(
        id=answer.id,
        model=model_name,
        text="".join(answer.texts),
        token_ids=answer.token_ids,
        finish_reason=end.finish_reason,
        usage=end.usage,
        timings=end.timings,
    )
    return Response(whole.model_dump_json(), media_type="application/json")


async def _events(answer: Answer, first: Piece, rest: AsyncGenerator[Piece]) -> AsyncGenerator[str]:
    async with aclosing(rest):
        try:
            yield sse_event(StreamDelta(id=answer.id, text=first.text, token_ids=list(first.token_ids)))
            async for piece in rest:
                yield sse_event(StreamDelta(id=answer.id, text=piece.text, token_ids=list(piece.token_ids)))
            yield sse_event(answer.end())
        except EngineFault as fault:
            # The status line is out already; the event has the shape of an error's body.
            yield sse_event(answer_to(fault).body())
    yield "data: [DONE]\n\n"


def sse_event(body: BaseModel) -> str:
    """A server-sent event.

    It is written in ASCII, because httpx's iter_lines takes U+0085, U+2028 and U+2029 for ends of lines too.
    """
    return f"data: {body.model_dump_json(ensure_ascii=True)}\n\n"
